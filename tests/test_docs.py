"""The documentation: every public name is in it and described, and its examples run."""

from __future__ import annotations

import dataclasses
import doctest
import importlib
import importlib.metadata
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import jitjax

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
SECTIONS = ("Args", "Attributes", "Returns", "Raises")
NAMES = jitjax.__all__


def find(path: str) -> Any:
    """Return the object of a dotted path that begins with the name of a module."""
    head, _, name = path.rpartition(".")
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError:
        return getattr(find(head), name)


def public(path: str) -> Any:
    """Return the object of a path within `jitjax`, where `jitjax.sample` is the function."""
    found: Any = jitjax
    for name in path.split("."):
        found = getattr(found, name)
    return found


def methods(name: str) -> list[str]:
    """Return the paths of the public methods that a class defines itself."""
    return [
        f"{name}.{method}"
        for method, value in vars(public(name)).items()
        if inspect.isfunction(getattr(value, "__func__", value))
        and (not method.startswith("_") or method == "__call__")
        and method != "from_diffusers"  # for conversion alone
    ]


# The names of `jitjax` and of its parts that the reference has to have.
DOCUMENTED = [*NAMES, "config.TransformerConfig", "config.T5Config", "config.CLIPConfig"]
DOCUMENTED += ["config.AutoencoderConfig", "memory.Program", "sampler.trace.Transition"]
DOCUMENTED += [f"sampler.{name}" for name in jitjax.sampler.__all__ if name not in NAMES]
DOCUMENTED += ["sampler.known.Known", "masks.mask_tokens", "masks.inpaint_anchors"]
DOCUMENTED += ["fill.fill_tokens", "sampler.keys.batch_keys"]
VIZ = [f"viz.{name}" for name in jitjax.viz.__all__]
CLASSES = [name for name in DOCUMENTED if inspect.isclass(public(name))]
FUNCTIONS = [name for name in DOCUMENTED if inspect.isfunction(public(name))] + VIZ
# The methods of a solver are called by diffrax alone.
METHODS = [path for name in CLASSES if name != "AdamsBashforth2" for path in methods(name)]
CANNOT_FAIL = ("sampler.beta_sigmas", "sampler.positions", "sampler.shifted_sigmas")


def sections(documented: Any) -> dict[str, set[str]]:
    """Return the names of the entries of each section of a docstring.

    An entry of "Args" may have several names; the site shows only the first of "Attributes".
    """
    found: dict[str, set[str]] = {}
    lines = inspect.cleandoc(documented.__doc__).splitlines()
    if lines[0].startswith("Return "):
        found["Returns"] = set()
    section = None
    for line in lines:
        if line.rstrip(":") in SECTIONS:
            section = found.setdefault(line.rstrip(":"), set())
        elif line and not line.startswith(" "):
            section = None
        elif section is not None and (entry := re.match(r" {4}([\w*]+(?:, [\w*]+)*):", line)):
            section |= {name.lstrip("*") for name in entry[1].split(", ")}
            assert section is not found.get("Attributes") or ", " not in entry[1]
    return found


def test_reference_has_every_public_name():
    pages = "\n".join(page.read_text() for page in (DOCS / "api").glob("*.md"))
    shown = {path: find(path) for path in re.findall(r"^::: ([\w.]+)$", pages, re.MULTILINE)}
    missing = [name for name in DOCUMENTED if not any(x is public(name) for x in shown.values())]
    assert not missing


@pytest.mark.parametrize("name", FUNCTIONS + METHODS)
def test_functions_are_described(name):
    function = inspect.unwrap(public(name))
    signature = inspect.signature(function)
    found = sections(function)
    assert found.get("Args", set()) == signature.parameters.keys() - {"self", "cls"}
    assert "Raises" in found or name in (*CANNOT_FAIL, *METHODS)
    assert "Returns" in found or signature.return_annotation in (None, "None")


@pytest.mark.parametrize("name", CLASSES)
def test_fields_are_described(name):
    cls = public(name)
    if dataclasses.is_dataclass(cls):
        fields = {field.name for field in dataclasses.fields(cls)}
    else:
        fields = set(getattr(cls, "_fields", ()))
    assert sections(cls).get("Attributes", set()) == fields


def examples(name: str) -> list[doctest.DocTest]:
    """Return the examples of a public name, and of the methods of a class."""
    finder = doctest.DocTestFinder(recurse=inspect.isclass(public(name)), exclude_empty=True)
    names = {"jax": jax, "jnp": jnp, "jitjax": jitjax}
    found = finder.find(public(name), name, module=False, globs=names)
    return [test for test in found if test.examples]


@pytest.mark.parametrize("name", [name for name in DOCUMENTED + VIZ if examples(name)])
def test_examples_in_docstrings(name):
    runner = doctest.DocTestRunner()
    for test in examples(name):
        runner.run(test)
    assert runner.summarize().attempted > 0
    assert runner.summarize().failed == 0


def headings(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub and MkDocs make them of plain words."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def test_links_between_files():
    """MkDocs checks those of the site; these are the repository's, where GitHub shows the files."""
    pages = [*ROOT.glob("*.md"), *DOCS.rglob("*.md"), *ROOT.glob("[tb]*/*.md")]
    broken, found = [], 0
    for page in pages:
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            if re.match(r"https?:", link):
                continue
            found += 1
            name, _, anchor = link.partition("#")
            target = page.parent / name if name else page
            if not target.exists() or (anchor and anchor not in headings(target)):
                broken.append(f"{page.relative_to(ROOT)}: {link}")
    assert found > 50
    assert not broken


@pytest.mark.slow
@pytest.mark.parametrize("page", ["index.md", "recipes.md"])
def test_snippets_run(page, tmp_path):
    """In a process of its own, which has two devices, and compiles without optimisations."""
    pytest.importorskip("matplotlib")
    program = Path(__file__).with_name("docs_program.py")
    flags = "--xla_force_host_platform_device_count=2"
    # As for the quick tests; newer versions have no such switch.
    if tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 11):
        flags += " --xla_cpu_use_fusion_emitters=false"
    environment = os.environ | {
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_ENABLE_COMPILATION_CACHE": "0",  # nothing else needs these programs
    }
    process = subprocess.run(
        [sys.executable, program, DOCS / page],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=environment,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    blocks = (DOCS / page).read_text().count("\n```python\n")
    assert blocks > 0
    assert process.stdout.splitlines()[-1] == f"{blocks} blocks"
