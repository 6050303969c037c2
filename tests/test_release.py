"""The version stands in `pyproject.toml`; what repeats it says the same."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import jitjax

ROOT = Path(__file__).parents[1]
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def test_version_of_the_package():
    assert jitjax.__version__ == VERSION


def test_version_in_the_citation_and_the_changes():
    citation = (ROOT / "CITATION.cff").read_text()
    assert re.search(rf"^version: {re.escape(VERSION)}$", citation, re.MULTILINE)
    assert f"\n## {VERSION}\n" in (ROOT / "CHANGELOG.md").read_text()
