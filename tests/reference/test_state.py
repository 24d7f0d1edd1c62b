"""Reading checkpoints: what is said where one cannot be read."""

from __future__ import annotations

import pytest
import torch

from patchloom.errors import UsageError
from patchloom.reference.state import read_state


class NotPlain:
    """What a checkpoint must not hold."""


def test_a_file_that_holds_objects_is_refused_in_plain_letters(tmp_path):
    torch.save({"model": {"weight": torch.zeros(1)}, "config": NotPlain()}, tmp_path / "model.pth")
    with pytest.raises(UsageError, match="cannot be read as plain tensors") as caught:
        read_state(tmp_path / "model.pth")
    assert str(caught.value).isprintable()
