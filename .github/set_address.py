"""Write the repository's address into every file that names it.

    python .github/set_address.py https://github.com/OWNER/jitjax

adds a Colab badge to each notebook and to the README, lets the notebooks install from the
repository, and puts the address into pyproject.toml, CITATION.cff and mkdocs.yml. Needs jupytext.
`workflows/address.yml` runs it at every push to GitHub and commits what it changed.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COLAB = "https://colab.research.google.com"


def badge(repository: str, name: str) -> str:
    """A Markdown link that opens the notebook `name` of `repository` (OWNER/NAME) in Colab."""
    target = f"{COLAB}/github/{repository}/blob/main/notebooks/{name}.ipynb"
    return f"[![Open {name} in Colab]({COLAB}/assets/colab-badge.svg)]({target})"


def replacements(root: Path, repository: str) -> list[tuple[Path, str, str]]:
    """What to change: a file, a pattern that it has once, with or without an address, the text."""
    address = f"https://github.com/{repository}"
    scripts = sorted((root / "notebooks").glob("*.py"))
    badges = " ".join(badge(repository, script.stem) for script in scripts)
    changes = [
        (
            root / "pyproject.toml",
            r'(\[project\.urls\]\nRepository = ".*"\n\n)?\[project\.scripts\]\n',
            f'[project.urls]\nRepository = "{address}"\n\n[project.scripts]\n',
        ),
        (
            root / "CITATION.cff",
            r"(?<=\ntype: software\n)(repository-code: .*\n)?",
            f"repository-code: {address}\n",
        ),
        (
            root / "mkdocs.yml",
            r"(?<=\nsite_name: jitjax\n)(repo_url: .*\n)?",
            f"repo_url: {address}\n",
        ),
        (root / "README.md", r"(?<=<!-- Colab -->\n)(\[!\[Open .*\n)?", f"{badges}\n"),
    ]
    for script in scripts:
        changes += [
            (
                script,
                r"(?<=# %% \[markdown\]\n)(# \[!\[Open .*\n#\n)?# # ",
                f"# {badge(repository, script.stem)}\n#\n# # ",
            ),
            (script, r'(?<=    published = ").*(?="\n)', f"jitjax[viz] @ git+{address}"),
        ]
    return changes


def set_address(root: Path, address: str) -> list[Path]:
    """Write `address` into the files below `root`; returns those that changed.

    Raises ValueError, and writes nothing, if `address` is not one of GitHub (Colab opens notebooks
    from there alone), or if a file does not have exactly one place for it.
    """
    match = re.fullmatch(r"https://github\.com/([\w.-]+/[\w.-]+?)(\.git)?/?", address)
    if match is None:
        raise ValueError(f"got {address!r}, expected https://github.com/OWNER/REPOSITORY")
    texts: dict[Path, str] = {}
    for file, pattern, text in replacements(root, match[1]):
        before = texts.get(file) or file.read_text()
        texts[file], count = re.subn(pattern, lambda _, text=text: text, before)
        if count != 1:
            raise ValueError(f"{file}: found {count} places for the address, expected 1")
    changed = [file for file, text in texts.items() if text != file.read_text()]
    for file in changed:
        file.write_text(texts[file])
    return changed


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("address", help="such as https://github.com/OWNER/jitjax")
    try:
        changed = set_address(ROOT, parser.parse_args().address)
    except ValueError as error:
        sys.exit(f"error: {error}")
    for file in changed:
        print(f"changed {file.relative_to(ROOT)}")
    scripts = [str(file) for file in changed if file.suffix == ".py"]
    if scripts:
        jupytext = [sys.executable, "-m", "jupytext", "--update", "--to", "ipynb"]
        subprocess.run([*jupytext, *scripts], check=True)


if __name__ == "__main__":
    main()
