"""`python -m jitjax`, the same as the command `jitjax`."""

import sys

from jitjax.cli import main

if __name__ == "__main__":
    sys.exit(main())
