"""Reading checkpoints: what is said where one cannot be read."""

from __future__ import annotations

import pytest
import torch

from patchloom.errors import UsageError
from patchloom.models.published import read_state


class NotPlain:
    """What a checkpoint must not hold."""


def test_a_file_that_holds_objects_is_refused_in_plain_letters(tmp_path):
    torch.save({"model": {"weight": torch.zeros(1)}, "config": NotPlain()}, tmp_path / "model.pth")
    with pytest.raises(UsageError, match="cannot be read as plain tensors") as caught:
        read_state(tmp_path / "model.pth")
    assert str(caught.value).isprintable()


NESTED = ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model.", "model._orig_mod.module.model."]


@pytest.mark.parametrize("prefix", ["", *NESTED, "_forward_module.module.", "_fsdp_wrapped_module."])
@pytest.mark.parametrize("keys", [(), ("state_dict",), ("model",), ("module", "model", "state_dict", "model_ema")])
def test_wrappers_come_off_in_any_nesting(prefix, keys):
    plain = {"blocks.0.attn.qkv.weight": torch.zeros(1), "pos_embed": torch.ones(1)}
    checkpoint = {prefix + name: value for name, value in plain.items()}
    for key in keys:
        checkpoint = {key: checkpoint, "epoch": 3}
    assert read_state(checkpoint) == plain


def test_wrappers_of_parts_come_off_and_parts_of_their_names_stay():
    names = ["_orig_mod.blocks.0._orig_mod.attn._checkpoint_wrapped_module.qkv.bias", "_orig_mod.my_module.model.w"]
    assert list(read_state(dict.fromkeys(names, torch.zeros(1)))) == ["blocks.0.attn.qkv.bias", "my_module.model.w"]
    mixed = ["module.backbone.norm.weight", "queue"]
    assert list(read_state(dict.fromkeys(mixed, torch.zeros(1)))) == mixed
    volumes = {"module.model.linear.weight": torch.zeros(1)}
    assert list(read_state(volumes, meant=("model.",))) == ["model.linear.weight"]
