"""A real training of six steps, and its checkpoints, for the tests of training."""

from __future__ import annotations

import shutil

import pytest
from tiny_trainer import adapter_weights, losses, trained


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """(folder with checkpoint-4 and checkpoint-6, losses by step, adapter weights) of six real steps."""
    folder = tmp_path_factory.mktemp("trainer") / "checkpoints"
    trainer = trained(folder)
    return folder, losses(trainer), adapter_weights(trainer)


@pytest.fixture
def checkpoints(uninterrupted, tmp_path):
    """A copy of the checkpoints that a test may break."""
    return shutil.copytree(uninterrupted[0], tmp_path / "checkpoints")
