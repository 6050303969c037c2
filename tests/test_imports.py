"""Which module may import which: the wings know nothing of what is built on them."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

BASE = ("jitjax.checkpoint", "jitjax.models", "jitjax.config")
TABLES, SOURCES = "jitjax.convert.tables", "jitjax.convert.sources"
COMPONENTS, LORA = "jitjax.convert.components", "jitjax.convert.lora"

# A module or package -> what it may import of jitjax beside itself. The longest name counts.
ALLOWED = {
    "jitjax.config": (),
    "jitjax.sampler": (),
    "jitjax.models": ("jitjax.config",),
    "jitjax.checkpoint": ("jitjax.models", "jitjax.config"),
    "jitjax.convert": (),
    "jitjax.convert.tables": BASE,
    "jitjax.convert.components": (TABLES, *BASE),
    "jitjax.convert.sources": (COMPONENTS, TABLES, *BASE),
    "jitjax.convert.lora": (SOURCES, COMPONENTS, TABLES, *BASE),
    "jitjax.convert.targets": (LORA, SOURCES, COMPONENTS, TABLES, *BASE),
    # The command alone is above `jitjax.loading`: `--to-diffusers` takes bundled names too.
    "jitjax.convert.__main__": ("jitjax.convert", "jitjax.loading", *BASE),
    "jitjax": ("jitjax",),
}


def modules() -> dict[str, Path]:
    """Every module of the installed package by its name; a package is its `__init__`."""
    found = {}
    for folder, package in (("jitjax", "jitjax"), ("convert", "jitjax.convert")):
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join((package, *parts)).removesuffix(".__init__")] = path
    return found


MODULES = modules()


def within(name: str, package: str) -> bool:
    """Whether `name` is `package` or in it."""
    return f"{name}.".startswith(f"{package}.")


def imports(module: str, path: Path) -> set[str]:
    """Modules of jitjax that one names in its imports, also within functions."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: package.count(".") + 2 - node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            full = {f"{base}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else base for name in full}
    found = {name for name in found if within(name, "jitjax")}
    assert found <= MODULES.keys(), f"{module} imports what is not there"
    return found


@pytest.mark.parametrize("module", MODULES)
def test_imports_only_what_it_may(module):
    wing = max((name for name in ALLOWED if within(module, name)), key=len)
    allowed = (wing, *ALLOWED[wing])
    found = imports(module, MODULES[module])
    assert not [name for name in found if not any(within(name, one) for one in allowed)]


def test_no_module_imports_itself_by_way_of_others():
    graph = {}
    for module, path in MODULES.items():
        graph[module] = found = imports(module, path)
        # The packages that a module is in run first, unless the importing one is in them as well.
        around = {name for name in MODULES for one in found if within(one, name)}
        graph[module] = found | {name for name in around if not within(module, name)}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a circle: {' <- '.join(error.args[1])}")
