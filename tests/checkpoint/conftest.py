"""Fixtures of the checkpoint tests.

The autoencoder has two thirds of all leaves, and each leaf takes time to write and to read.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest

import jitjax


@pytest.fixture
def copy(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


@pytest.fixture(scope="session")
def few(small) -> jitjax.FluxParams:
    """The transformer and the text encoders of `small`."""
    return dataclasses.replace(small, autoencoder={})


@pytest.fixture(scope="session")
def saved_few(few, tmp_path_factory) -> Path:
    """A checkpoint of `few`, which no test may edit."""
    path = tmp_path_factory.mktemp("saved") / "few"
    jitjax.save(few, path)
    return path


@pytest.fixture
def copy_of_few(saved_few, tmp_path) -> Path:
    return Path(shutil.copytree(saved_few, tmp_path / "copy"))
