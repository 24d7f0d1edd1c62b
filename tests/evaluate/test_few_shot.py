"""Episodes: drawn without repetition, the same for every encoder, surer the more there are."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import patchloom as pl
from patchloom.errors import UsageError
from patchloom.evaluate.few_shot import draw_episodes, logistic, nearest_mean
from small_images import QUICK, write_images

LABELS = np.repeat(np.arange(6), [12, 12, 12, 12, 12, 2])
DRAW = {"ways": 3, "shots": 2, "queries": 5, "episodes": 30, "seed": 1}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("data")
    return {"train": str(write_images(root / "train", 12)), "test": str(write_images(root / "test", 8, seed=1))}


def test_an_episode_takes_each_image_once_and_its_own_classes():
    episodes = draw_episodes(LABELS, None, **DRAW)
    assert len(episodes) == 30
    for one in episodes:
        assert len(set(one.classes)) == 3
        assert 5 not in one.classes  # two images are too few
        everything = np.concatenate([one.support.reshape(-1), one.query.reshape(-1)])
        assert len(set(everything)) == 3 * 7
        for row, label in enumerate(one.classes):
            assert (LABELS[one.support[row]] == label).all()
            assert (LABELS[one.query[row]] == label).all()
    assert len({tuple(one.support.reshape(-1)) for one in episodes}) == 30


def test_episodes_are_of_the_seed_and_more_contain_fewer():
    first, more = draw_episodes(LABELS, None, **DRAW), draw_episodes(LABELS, None, **{**DRAW, "episodes": 40})
    assert all((a.support == b.support).all() and (a.query == b.query).all() for a, b in zip(first, more, strict=False))
    other = draw_episodes(LABELS, None, **{**DRAW, "seed": 2})
    assert any((a.support != b.support).any() for a, b in zip(first, other, strict=True))


def test_classifiers_by_their_formulas():
    generator = torch.Generator().manual_seed(0)
    support = torch.nn.functional.normalize(torch.randn(3, 4, 6, generator=generator), dim=2)
    query = torch.nn.functional.normalize(torch.randn(9, 6, generator=generator), dim=1)
    for row, said in zip(query.double(), nearest_mean(support, query), strict=True):
        means = support.double().mean(1)
        assert int(said) == int(np.argmax([float(row @ mean / mean.norm()) for mean in means]))
    assert (logistic(support, support.flatten(0, 1)) == torch.arange(3).repeat_interleave(4)).double().mean() > 0.8


def test_figures_are_means_over_episodes(data):
    settings = {**QUICK, "ways": 3, "shots": 2, "queries": 4, "episodes": 40, "encoder": "pixels", **data}
    found = pl.evaluate("few_shot", **settings)
    assert 0.34 < found["nearest"] <= 1
    assert found["score"] == found["accuracy"] == found["nearest"]
    assert found["interval"][0] < found["score"] < found["interval"][1]
    other = pl.evaluate("few_shot", **settings, classifier="logistic")
    assert other["score"] == found["logistic"]
    many = pl.evaluate("few_shot", **{**settings, "episodes": 160})
    width, narrow = (one["interval"][1] - one["interval"][0] for one in (found, many))
    assert narrow == pytest.approx(width / 2, rel=0.25)


def test_one_source_is_split_within_each_episode(data):
    settings = {**QUICK, "ways": 3, "shots": 4, "queries": 8, "episodes": 10, "encoder": "pixels"}
    assert pl.evaluate("few_shot", **settings, train=data["train"], test=data["train"])["n"] == 36
    with pytest.raises(UsageError, match="0 classes have 5 images to learn from and 8 to measure on"):
        pl.evaluate("few_shot", **{**settings, "shots": 5}, train=data["train"], test=data["train"])


def test_two_encoders_are_compared_episode_by_episode(data, tmp_path):
    for number, size in enumerate((8, 16)):
        pl.evaluate(
            "few_shot", encoder="pixels", image_size=size, predictions=str(tmp_path / f"{number}.npz"), ways=3, shots=1,
            queries=4, episodes=30, **data, **QUICK,
        )  # fmt: skip
    found = pl.evaluate("compare", files=[tmp_path / "0.npz", tmp_path / "1.npz"])
    assert found["n"] == 30
    assert found["differences"][0]["interval"][0] <= found["differences"][0]["difference"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ways": 1}, "ways is 1"),
        ({"shots": 0}, "shots is 0"),
        ({"episodes": 1}, "episodes is 1"),
        ({"ways": 4}, "3 classes have 5 images"),
        ({"classifier": "svm"}, "unknown classifier 'svm'"),
    ],
)
def test_what_cannot_be_is_refused(settings, message, data):
    with pytest.raises(UsageError, match=message):
        pl.evaluate("few_shot", **{"encoder": "pixels", "queries": 4, **data, **QUICK, **settings})
