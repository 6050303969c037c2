"""The version stands in `pyproject.toml`, and what repeats it says the same; so of the address."""

from __future__ import annotations

import re
import runpy
import shutil
import tomllib
from pathlib import Path

import pytest

import jitjax

ROOT = Path(__file__).parents[1]
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def test_version_of_the_package():
    assert jitjax.__version__ == VERSION


def test_version_in_the_citation_and_the_changes():
    citation = (ROOT / "CITATION.cff").read_text()
    assert re.search(rf"^version: {re.escape(VERSION)}$", citation, re.MULTILINE)
    assert f"\n## {VERSION}\n" in (ROOT / "CHANGELOG.md").read_text()


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the files that name the repository's address."""
    for name in ("README.md", "pyproject.toml", "CITATION.cff", "mkdocs.yml", "notebooks"):
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    return tmp_path


set_address = runpy.run_path(str(ROOT / ".github" / "set_address.py"))["set_address"]


def test_the_address_of_the_repository(copy: Path):
    set_address(copy, "https://github.com/first/jitjax")
    changed = set_address(copy, "https://github.com/other/jit.jax.git")
    scripts = sorted((copy / "notebooks").glob("*.py"))
    assert len(scripts) == 4
    assert len(changed) == 8
    for file in changed:
        text = file.read_text()
        assert "other/jit.jax" in text
        assert "first/jitjax" not in text
    colab = "https://colab.research.google.com/github/other/jit.jax/blob/main/notebooks/{}.ipynb"
    for script in scripts:
        text = script.read_text()
        assert text.count(f"({colab.format(script.stem)})\n#\n# # ") == 1
        assert '    published = "jitjax[viz] @ git+https://github.com/other/jit.jax"\n' in text
        compile(text, script, "exec")
        assert (copy / "README.md").read_text().count(f"({colab.format(script.stem)})") == 1
    project = tomllib.loads((copy / "pyproject.toml").read_text())["project"]
    assert project["urls"] == {"Repository": "https://github.com/other/jit.jax"}
    assert project["scripts"] == {"jitjax": "jitjax.cli:main"}
    assert (
        "\nrepository-code: https://github.com/other/jit.jax\n"
        in (copy / "CITATION.cff").read_text()
    )
    assert set_address(copy, "https://github.com/other/jit.jax/") == []


@pytest.mark.parametrize(
    "address", ["github.com/a/b", "https://gitlab.com/a/b", "https://github.com/a", ""]
)
def test_another_address_is_refused(copy: Path, address: str):
    with pytest.raises(ValueError, match=r"expected https://github.com/OWNER/REPOSITORY"):
        set_address(copy, address)


def test_nothing_is_written_if_a_file_has_no_place(copy: Path):
    (copy / "CITATION.cff").write_text("cff-version: 1.2.0\n")
    before = (copy / "pyproject.toml").read_text()
    with pytest.raises(ValueError, match=r"CITATION\.cff: found 0 places"):
        set_address(copy, "https://github.com/first/jitjax")
    assert (copy / "pyproject.toml").read_text() == before
