"""The Python API: light to import, verbs callable, encoders known to timm."""

from __future__ import annotations

import subprocess
import sys

import pytest

import patchloom as pl


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_import_loads_nothing_heavy():
    heavy = "['torch', 'timm', 'lightning', 'matplotlib', 'torchvision', 'sklearn']"
    assert python(f"import sys, patchloom; print([m for m in {heavy} if m in sys.modules])") == "[]\n"


@pytest.mark.slow
@pytest.mark.parametrize("order", ["import patchloom, timm", "import timm, patchloom"])
def test_encoders_are_known_to_timm_in_either_order_of_import(order):
    assert python(f"{order}; print(timm.is_model('ccvit_base_patch16_224'))") == "True\n"


@pytest.mark.parametrize("verb", ["pretrain", "adapt", "evaluate", "embed", "export", "demo"])
def test_a_verb_is_a_module_and_a_function(verb):
    module = getattr(pl, verb)
    assert callable(module)
    assert module.__name__ == f"patchloom.{verb}"


def test_methods_are_listed():
    assert "ccvit" in pl.list_methods("pretrain")
    assert "finetune" in pl.list_methods("adapt")
    assert {"knn", "linear"} <= set(pl.list_methods("evaluate"))
    assert "ccvit" in pl.list_references()


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(pl.UsageError, match="did you mean pretrain"):
        pl.list_methods("pretrian")
    with pytest.raises(pl.UsageError, match="did you mean ccvit"):
        pl.pretrain("cvit", data="photos", out="nowhere")
    with pytest.raises(pl.UsageError, match="did you mean knn"):
        pl.evaluate("kn", encoder="pixels", train="digits", test="digits:test")
