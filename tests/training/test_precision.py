"""What is said of arithmetic that nobody chose."""

import pytest
import torch

from patchloom.training.config import TrainConfig
from patchloom.training.run import precision_hint

AMX, PLAIN = {"amx_bf16": True, "avx2": True}, {"amx_bf16": False, "avx512_bf16": False, "avx2": True}


@pytest.mark.parametrize(
    ("able", "precision", "device", "hinted"),
    [
        (AMX, "auto", "CPU", True),
        ({"avx512_bf16": True}, "auto", "CPU", True),
        (AMX, "32-true", "CPU", False),
        (AMX, "auto", "CUDA", False),
        (PLAIN, "auto", "CPU", False),
        ({}, "auto", "CPU", False),
    ],
)
def test_bfloat16_is_hinted_at_where_the_processor_has_it_and_nobody_chose(
    monkeypatch, able, precision, device, hinted
):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    hint = precision_hint(TrainConfig(data="photos", out="run", precision=precision), device)
    assert (hint is not None and "bf16-mixed" in hint) == hinted
