"""Which module may import which: a subpackage never imports what is built on it."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import jitjax

PACKAGE = Path(jitjax.__file__).parent

NESTED = "jitjax.nested"
BASE = ("jitjax.checkpoint", "jitjax.models", "jitjax.config", "jitjax.validation", NESTED)
TABLES, SOURCES = "jitjax.convert.tables", "jitjax.convert.sources"
COMPONENTS, LORA = "jitjax.convert.components", "jitjax.convert.lora"
ORIGINAL = "jitjax.convert.original"

# Module or package -> what it may import from jitjax, besides itself. For each module the longest
# name that contains it applies.
ALLOWED = {
    "jitjax.validation": (),
    "jitjax.config": ("jitjax.validation",),
    "jitjax.sampler": (),
    "jitjax.nested": (),
    "jitjax.models": ("jitjax.config", NESTED),
    "jitjax.checkpoint": ("jitjax.models", "jitjax.config", "jitjax.validation", NESTED),
    "jitjax.convert": (),
    "jitjax.convert.tables": BASE,
    "jitjax.convert.components": (TABLES, *BASE),
    "jitjax.convert.original": (TABLES, *BASE),
    "jitjax.convert.sources": (ORIGINAL, COMPONENTS, TABLES, *BASE),
    "jitjax.convert.lora": (SOURCES, ORIGINAL, COMPONENTS, TABLES, *BASE),
    "jitjax.convert.targets": (LORA, SOURCES, ORIGINAL, COMPONENTS, TABLES, *BASE),
    # Only the command may import `jitjax.loading`: `--to-diffusers` also takes bundled names.
    "jitjax.convert.__main__": (
        "jitjax.convert",
        "jitjax.loading",
        "jitjax.arguments",
        "jitjax.command",
        "jitjax.startup",
        *BASE,
    ),
    "jitjax": ("jitjax",),
}


def modules() -> dict[str, Path]:
    """Return the path of each module of jitjax by name; a package maps to its `__init__.py`."""
    paths = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        paths[".".join(parts).removesuffix(".__init__")] = path
    return paths


MODULES = modules()


def is_within(name: str, package: str) -> bool:
    """Whether the module `name` is `package` or is contained in it."""
    return f"{name}.".startswith(f"{package}.")


def imports(module: str, path: Path) -> set[str]:
    """Return the modules of jitjax that a module imports, including imports in functions."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            parents = parents[: len(parents) + 1 - node.level] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            imported = {f"{base}.{alias.name}" for alias in node.names}
            names |= {name if name in MODULES else base for name in imported}
    names = {name for name in names if is_within(name, "jitjax")}
    unknown = names - MODULES.keys()
    assert not unknown, f"{module} imports {unknown}; expected modules of jitjax"
    return names


@pytest.mark.parametrize("module", MODULES)
def test_module_imports_only_allowed_modules(module):
    rule = max((name for name in ALLOWED if is_within(module, name)), key=len)
    allowed = (rule, *ALLOWED[rule])
    names = imports(module, MODULES[module])
    assert not [name for name in names if not any(is_within(name, other) for other in allowed)]


def test_no_import_cycles():
    graph = {}
    for module, path in MODULES.items():
        names = imports(module, path)
        # Importing a module first runs the packages that contain it. Those that also contain the
        # importing module are running already.
        packages = {package for package in MODULES for name in names if is_within(name, package)}
        graph[module] = names | {name for name in packages if not is_within(module, name)}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"import cycle: {' <- '.join(error.args[1])}")


def python(code: str) -> str:
    """Run Python without the checks of types that the tests add; return what it prints."""
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()


def test_what_takes_long_to_import_is_imported_at_its_first_use():
    late = ("flax", "diffrax", "equinox", "scipy", "orbax", "transformers", "torch", "PIL")
    code = f"import jitjax, sys; print([name for name in {late} if name in sys.modules])"
    assert python(code) == "[]"
    # Loading the bundled checkpoint needs none of the models.
    code = "import sys, jitjax; jitjax.load('tiny'); print('flax' in sys.modules)"
    assert python(code) == "False"


@pytest.mark.parametrize("package", ["jitjax", "jitjax.sampler"])
def test_public_names_exist_before_their_first_use(package):
    code = f"""import {package} as package
assert set(package.__all__) <= set(dir(package))
print([name for name in package.__all__ if getattr(package, name) is None])
try:
    package.nothing
except AttributeError as error:
    print(error)
from {package} import *"""
    expected = f"[]\nmodule '{package}' has no attribute 'nothing'"
    assert python(code) == expected
