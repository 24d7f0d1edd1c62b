"""Settings: what is refused, what is converted, and the file that repeats a run."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import ClassVar

import pytest
import yaml

from patchloom.errors import UsageError
from patchloom.io import read_config
from patchloom.systems.mae.config import MAEConfig
from patchloom.systems.prompt_cam.config import PromptCAMConfig
from patchloom.terminal.options import read_options
from patchloom.training.config import TrainConfig, config_from_mapping, refuse_changes, write_config

NEEDED = {"data": "photos", "out": "runs/a"}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("epochs", 0, "epochs is 0; it must be at least 1"),
        ("drop_path", 1.0, "drop_path is 1.0; it must be at least 0 and below 1"),
        ("lr", 0.0, "lr is 0.0; it must be above 0"),
        ("betas", (0.9, 1.0), "betas is"),
        ("precision", "bf16", "did you mean bf16-mixed"),
        ("num_workers", -1, "num_workers is -1"),
    ],
)
def test_impossible_values_are_refused_with_the_value(name, value, message):
    with pytest.raises(UsageError, match=message.replace("(", r"\(")):
        TrainConfig(**NEEDED, **{name: value})


def test_unknown_settings_are_refused_with_the_nearest():
    with pytest.raises(UsageError, match="did you mean batch_size"):
        config_from_mapping(TrainConfig, {**NEEDED, "batchsize": 3})


def test_missing_settings_are_named():
    with pytest.raises(UsageError, match="missing data and out"):
        config_from_mapping(TrainConfig, {})


@pytest.mark.parametrize(
    ("name", "given", "kept"),
    [
        ("lr", "1e-3", 1e-3),
        ("lr", 1, 1.0),
        ("betas", [0.9, 0.95], (0.9, 0.95)),
        ("max_steps", None, None),
        ("clip_grad", None, None),
        ("warmup_epochs", 5, 5.0),
    ],
)
def test_near_misses_of_yaml_are_converted(name, given, kept):
    config = config_from_mapping(TrainConfig, {**NEEDED, name: given})
    assert getattr(config, name) == kept
    assert type(getattr(config, name)) is type(kept)


@pytest.mark.parametrize(("name", "value"), [("epochs", "many"), ("epochs", 1.5), ("resume", "yes"), ("lr", "fast")])
def test_values_of_the_wrong_kind_are_refused(name, value):
    with pytest.raises(UsageError, match=f"{name} is {value!r}; expected"):
        config_from_mapping(TrainConfig, {**NEEDED, name: value})


def test_resume_and_overwrite_exclude_each_other():
    with pytest.raises(UsageError, match="set one of them"):
        TrainConfig(**NEEDED, resume=True, overwrite=True)


def test_written_settings_read_back_equal(tmp_path):
    config = TrainConfig(**NEEDED, lr=3e-4, betas=(0.8, 0.9), max_steps=7, overwrite=True)
    write_config(config, tmp_path / "config.yaml", "pretrain made_up")
    again = config_from_mapping(TrainConfig, read_config(tmp_path / "config.yaml"))
    assert again == dataclasses.replace(config, overwrite=False, out=str(Path.cwd() / config.out))
    assert (tmp_path / "config.yaml").read_text().startswith("# patchloom pretrain made_up --config config.yaml\n")


def test_resuming_refuses_what_would_make_another_run(tmp_path):
    saved = yaml.safe_load(yaml.safe_dump({**dataclasses.asdict(TrainConfig(**NEEDED)), "betas": [0.9, 0.98]}))
    refuse_changes(saved, TrainConfig(**NEEDED, num_workers=5, log_every=3))
    with pytest.raises(UsageError, match=r"has lr=0.0015, not 0.1"):
        refuse_changes(saved, TrainConfig(**NEEDED, lr=0.1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class WithPresets(TrainConfig):
    """Made up."""

    PRESETS: ClassVar = {"long": {"epochs": 800, "lr": 1e-4}, "short": {"epochs": 2}}


def test_a_preset_replaces_defaults_and_gives_way_to_what_is_said():
    config = config_from_mapping(WithPresets, {**NEEDED, "preset": "long", "lr": 3e-3})
    assert (config.epochs, config.lr, config.preset) == (800, 3e-3, "long")


def test_unknown_presets_are_refused():
    with pytest.raises(UsageError, match=r"unknown preset 'lon'.*long"):
        config_from_mapping(WithPresets, {**NEEDED, "preset": "lon"})
    with pytest.raises(UsageError, match="this method has none"):
        config_from_mapping(TrainConfig, {**NEEDED, "preset": "long"})


OLD = {"ema": None, "experts": 0, "share_rate": 0.3, "layer_decay": 1.0, "crop_scale": [0.08, 1.0], "pool": "auto"}


def test_settings_that_did_nothing_are_read_where_they_were_left_alone(tmp_path):
    """A run of an earlier version goes on, from Python and by --config."""
    config = config_from_mapping(PromptCAMConfig, {**NEEDED, **OLD})
    assert not set(OLD) & {field.name for field in dataclasses.fields(config)}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**NEEDED, **OLD}))
    read = read_options("adapt prompt_cam", "", PromptCAMConfig, ["--config", str(tmp_path / "config.yaml")])
    assert config_from_mapping(PromptCAMConfig, read) == config


@pytest.mark.parametrize("changed", [{"ema": 0.9}, {"crop_scale": [0.5, 1.0]}, {"experts": 2}])
def test_settings_that_did_nothing_are_refused_where_they_ask_for_something(changed):
    name, value = next(iter(changed.items()))
    with pytest.raises(UsageError, match=re.escape(f"{name} is {value}, and this method does without")):
        config_from_mapping(PromptCAMConfig, {**NEEDED, **OLD, **changed})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"experts": 1}, "experts is 1; it must be at least 2"),
        ({"experts": 4, "share_rate": 0.8}, "share_rate is 0.8; it must be at least 0 and at most 0.75"),
        ({"experts": 2, "strategy": "fsdp"}, "use strategy=ddp"),
        ({"layer_decay": 0.0}, "layer_decay is 0.0; it must be above 0 and at most 1"),
        ({"ema": 1.0}, "ema is 1.0; it must be above 0 and below 1"),
    ],
)
def test_groups_hold_their_rules_in_what_is_composed_of_them(settings, message):
    with pytest.raises(UsageError, match=message):
        MAEConfig(**NEEDED, **settings)
