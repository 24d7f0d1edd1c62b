"""What CONTRIBUTING.md says to write is a method: its code is run as it stands there."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import pytest

import patchloom as pl
from patchloom import registry

GUIDE = Path(__file__).parent.parent / "CONTRIBUTING.md"


@pytest.fixture
def rotation(monkeypatch):
    """The method of the guide, put where it says."""
    config, method, entry = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.S)
    for name, code in (("", ""), (".config", config), (".method", method)):
        module = types.ModuleType(f"patchloom.systems.rotation{name}")
        monkeypatch.setitem(sys.modules, module.__name__, module)
        exec(compile(code, f"CONTRIBUTING.md{name}", "exec"), module.__dict__)
    found = eval(f"{{{entry}}}", {"Entry": registry.Entry})
    monkeypatch.setitem(registry.METHODS["pretrain"], "rotation", found["rotation"])


def test_the_method_of_the_guide_trains_and_its_bundle_opens(rotation, tmp_path):
    assert "rotation" in pl.list_methods("pretrain")
    settings = {"encoder": "vit_micro_patch4_32", "batch_size": 16, "max_steps": 3, "num_workers": 0, "turns": 2}
    quiet = {"probe_every": 0, "health_every": 0, "accelerator": "cpu", "log_every": 1}
    run = pl.pretrain("rotation", data="photos", out=str(tmp_path / "run"), **settings, **quiet)
    assert 0 <= run.summary["accuracy"] <= 1
    assert run.report.exists()
    assert pl.load(str(run.model)).num_features == 128


def test_its_summary_is_the_question_its_class_asks(rotation):
    sentence = registry.entry("pretrain", "rotation").sentence
    assert registry.method_class("pretrain", "rotation").__doc__ == sentence == "Which way up is the image?"


def test_an_unknown_setting_of_it_is_refused_with_the_nearest(rotation, tmp_path):
    with pytest.raises(pl.UsageError, match="did you mean turns"):
        pl.pretrain("rotation", data="photos", out=str(tmp_path / "run"), turn=2)
