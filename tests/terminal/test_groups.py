"""Options in groups: every shared setting has its heading, ablations come last."""

from __future__ import annotations

import dataclasses

import pytest

from patchloom import registry
from patchloom.evaluate.config import EvaluationConfig
from patchloom.explain.config import ExplainConfig
from patchloom.terminal.groups import ABLATIONS, GROUPS, NEEDED, OWN, grouped
from patchloom.training.config import TrainConfig
from patchloom.training.labelled_config import LabelledConfig, LossOptions
from patchloom.training.options import ExpertOptions
from patchloom.training.supervised_config import SupervisedConfig

SHARED = (TrainConfig, ExpertOptions, LabelledConfig, LossOptions, SupervisedConfig, EvaluationConfig, ExplainConfig)
METHODS = [(verb, name) for verb in registry.METHODS for name in registry.METHODS[verb]]


@pytest.mark.parametrize("shared", SHARED)
def test_what_methods_share_is_no_methods_own(shared):
    headed = {name for names in GROUPS.values() for name in names}
    assert {field.name for field in dataclasses.fields(shared)} - headed - {"adapters"} == set()


def test_no_option_stands_under_two_headings():
    names = [name for members in GROUPS.values() for name in members]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(("verb", "name"), METHODS)
def test_each_option_is_shown_once_and_ablations_are_fields(verb, name):
    settings = registry.settings_class(verb, name)
    fields = [field.name for field in dataclasses.fields(settings)]
    required = [field.name for field in dataclasses.fields(settings) if field.default is dataclasses.MISSING]
    ablations = getattr(settings, "ABLATIONS", ())
    groups = grouped(fields, required, ablations)
    assert sorted(name for names in groups.values() for name in names) == sorted(fields)
    assert set(ablations) <= set(fields)
    assert next(iter(groups)) == NEEDED
    if ablations:
        assert list(groups)[-2:] == [OWN, ABLATIONS]
        assert set(groups[ABLATIONS]) == set(ablations)
