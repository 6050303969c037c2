"""The version stands in `pyproject.toml`, and what repeats it says the same; so of the address."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

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


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-c", "user.name=me", "-c", "user.email=me@example.com", *arguments]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout


@pytest.mark.slow
def test_the_workflow_that_writes_the_address(copy: Path, tmp_path_factory):
    """Its commands, run as GitHub would: a push adds the badges, the next changes nothing."""
    pytest.importorskip("jupytext")
    shutil.copytree(ROOT / ".github", copy / ".github")
    origin = tmp_path_factory.mktemp("origin")
    git(origin, "init", "--bare", "--initial-branch", "main")
    git(copy, "init", "--initial-branch", "main")
    git(copy, "remote", "add", "origin", str(origin))
    git(copy, "add", ".")
    git(copy, "commit", "--message", "All files")
    git(copy, "push", "--set-upstream", "origin", "main")
    workflow = yaml.safe_load((ROOT / ".github/workflows/address.yml").read_text())
    (job,) = workflow["jobs"].values()
    commands = [step["run"] for step in job["steps"] if "run" in step]
    assert commands.pop(0) == "pip install jupytext"
    environment = os.environ | {
        "GITHUB_SERVER_URL": "https://github.com",
        "GITHUB_REPOSITORY": "first/jitjax",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    for commits in (2, 2):
        for command in commands:
            subprocess.run(["bash", "-e", "-c", command], cwd=copy, env=environment, check=True)
        assert int(git(origin, "rev-list", "--count", "main")) == commits
    for name in ("README.md", "notebooks/quickstart.ipynb"):
        text = git(origin, "show", f"main:{name}")
        assert "colab.research.google.com/github/first/jitjax/blob/main/notebooks/quick" in text
    assert git(copy, "status", "--porcelain") == ""


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
