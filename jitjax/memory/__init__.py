"""What a picture needs of device, host and disk, computed before anything is loaded or compiled.

    weights.py    bytes of the parameters: dtype, quantisation, division over a mesh
    programs.py   bytes that each compiled program takes beside them
    estimate.py   `estimate_memory`, which puts both together, and `MemoryEstimate`
    check.py      refuses a batch that cannot fit, for `sample`
    table.py      the table "what fits where" of the documentation
    command.py    `jitjax memory`

No model is traced, so that all of it takes milliseconds.
"""

from jitjax.memory.estimate import MemoryEstimate, estimate_memory
from jitjax.memory.programs import Program

__all__ = ["MemoryEstimate", "Program", "estimate_memory"]
