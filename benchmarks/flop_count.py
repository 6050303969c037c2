"""FLOPs of a function by XLA's cost analysis, with loops counted as often as they run.

XLA counts the body of a loop once. Here each body of a `lax.scan` (also of a `lax.map`) is analysed
as a program of its own, and counted as often as the scan's length says. The scans are taken from
the traced program: there their lengths are exact, whereas a compiled program no longer says how
many products a call of cuBLAS or oneDNN stands for, and XLA counts none for such a call. Nothing is
compiled and nothing is computed, so arguments may be `jax.ShapeDtypeStruct`s of any size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, jaxpr_as_fun, jaxprs_in_params


def xla_flops(function: Callable[..., Any], *args: Any) -> float:
    """Count the FLOPs of `function(*args)` on the default platform.

    Additions and multiplications of all operations count, exponentials and the like do not.

    Args:
        function: any function that JAX can trace.
        args: arrays or `jax.ShapeDtypeStruct`s.

    Returns:
        FLOPs; a multiply-add counts as two.

    Raises:
        ValueError: the function has a loop of unknown length, or a loop in a conditional whose
            branch is chosen at run time.
    """
    return _flops(jax.make_jaxpr(function)(*args))[0]


def _flops(program: ClosedJaxpr) -> tuple[float, float]:
    """Return the FLOPs of a program, and those of each loop's body counted once, as XLA counts."""
    flops = bodies_once = _flops_of_bodies_once(program)
    for body, length in _scans(program.jaxpr):
        of_body, of_body_once = _flops(body)
        flops += length * of_body - of_body_once
    return flops, bodies_once


def _flops_of_bodies_once(program: ClosedJaxpr) -> float:
    avals = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in program.in_avals]
    lowered = jax.jit(jaxpr_as_fun(program), keep_unused=True).lower(*avals)
    return float((lowered.cost_analysis() or {}).get("flops", 0.0))


def _scans(program: Jaxpr) -> Iterator[tuple[ClosedJaxpr, int]]:
    """Yield body and length of every scan, but not of the scans in these bodies."""
    for equation in program.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "scan":
            yield params["jaxpr"], params["length"]
        elif name == "while":
            raise ValueError("a while loop has no known length; expected only scans")
        elif name == "cond" and params.get("branches_platforms"):
            yield from _scans(_branch_of_platform(params).jaxpr)
        else:
            inner = [scan for body in jaxprs_in_params(params) for scan in _scans(body)]
            if name == "cond" and inner:
                raise ValueError("a conditional contains a loop; expected it outside")
            yield from inner


def _branch_of_platform(params: dict[str, Any]) -> ClosedJaxpr:
    """Return the branch of `lax.platform_dependent` that the default platform takes."""
    names = {jax.default_backend()}
    if "gpu" in names:
        version = jax.devices()[0].client.platform_version.lower()
        names.add("cuda" if "cuda" in version else "rocm")
    branches = zip(params["branches"], params["branches_platforms"], strict=True)
    return next(branch for branch, names_of in branches if not names_of or names & {*names_of})
