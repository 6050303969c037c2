"""Fixtures of the checkpoint tests."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import jitjax


@pytest.fixture(scope="module")
def saved(small, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "checkpoint"
    jitjax.save(small, path)
    return path


@pytest.fixture
def copy(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))
