"""The Python API: light to import, verbs callable, encoders known to timm."""

from __future__ import annotations

import inspect
import pickle
import subprocess
import sys

import pytest

import patchloom as pl


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_import_loads_nothing_heavy():
    heavy = "['torch', 'timm', 'lightning', 'matplotlib', 'torchvision', 'sklearn', 'numpy']"
    assert python(f"import sys, patchloom; print([m for m in {heavy} if m in sys.modules])") == "[]\n"


@pytest.mark.slow
@pytest.mark.parametrize("order", ["import patchloom, timm", "import timm, patchloom"])
def test_encoders_are_known_to_timm_in_either_order_of_import(order):
    assert python(f"{order}; print(timm.is_model('ccvit_base_patch16_224'))") == "True\n"


VERBS = [
    "pretrain",
    "adapt",
    "distill",
    "clean",
    "segment",
    "evaluate",
    "explain",
    "embed",
    "export",
    "demo",
    "load",
    "load_reference",
]
VERBS += ["fit_codebook", "show_codebook", "import_reference", "merge_to_bundle"]


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_is_a_plain_function(verb):
    function = getattr(pl, verb)
    assert inspect.isfunction(function)
    assert pickle.loads(pickle.dumps(function)) is function
    described = function.__doc__.split("Args:")[1]
    for name, parameter in inspect.signature(function).parameters.items():
        assert parameter.annotation is not inspect.Parameter.empty, name
        assert f"{name}:" in described, name


def test_a_verb_stays_a_function_when_the_package_of_its_name_is_imported():
    lines = [
        "import patchloom.evaluate.config, patchloom.features.embed, patchloom.segment.segment_config",
        "from patchloom.explain import config",
        "import inspect, sys, patchloom as pl",
        "print(all(map(inspect.isfunction, (pl.segment, pl.evaluate, pl.embed, pl.explain))))",
        "print(sys.modules['patchloom.segment'].__path__ != [])",
    ]
    assert python("\n".join(lines)) == "True\nTrue\n"


def test_what_is_missing_is_named():
    with pytest.raises(pl.UsageError, match="missing data"):
        pl.pretrain("ccvit", out="nowhere")


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
