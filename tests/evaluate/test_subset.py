"""A few labelled images: the published draws, written out with torch's and numpy's own calls."""

from __future__ import annotations

import csv

import numpy as np
import pytest
import torch

import patchloom as pl
from patchloom.errors import UsageError
from patchloom.evaluate.linear_grid import LinearGridConfig
from patchloom.evaluate.multilabel import MultiLabelConfig
from patchloom.evaluate.subset import evenly_spaced, few_shot_subset, nested_shots
from patchloom.training.config import config_from_mapping
from small_images import QUICK, write_images

CLASSES = torch.tensor([2, 0, 5, 0, 2, 2, 0, 5, 0, 2, 0, 0, 2, 5, 0, 0, 2])


def several(n: int = 30, labels: int = 4) -> torch.Tensor:
    hot = (torch.rand(n, labels, generator=torch.Generator().manual_seed(0)) < 0.4).float()
    hot[:, 2] = 0  # a label no image has
    hot[3, 0] = torch.nan
    return hot


@pytest.mark.parametrize("seed", [0, 4])
@pytest.mark.parametrize("shots", [1, 4, 50])
def test_dinov2_takes_the_first_of_a_permutation_of_each_class(shots, seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # the published draw is from torch's global state
        expected = []
        for label in (0, 2, 5):
            members = [i for i, one in enumerate(CLASSES.tolist()) if one == label]
            expected += [members[j] for j in torch.randperm(len(members)).tolist()[:shots]]
    assert few_shot_subset(CLASSES, shots, protocol="dinov2", seed=seed).tolist() == expected


@pytest.mark.parametrize("shots", [1, 3, 0.1, 0.5])
def test_dinov3_takes_numbers_or_shares_in_the_order_of_the_data(shots):
    for labels in (CLASSES, several()):
        draw = torch.Generator().manual_seed(7)
        picked = np.zeros(len(labels), dtype=bool)
        for label in (0, 2, 5) if labels.ndim == 1 else range(4):
            column = labels.tolist() if labels.ndim == 1 else labels[:, label].tolist()
            members = [i for i, one in enumerate(column) if one == (label if labels.ndim == 1 else 1)]
            if members:
                count = max(int(len(members) * shots), 1) if shots < 1 else shots
                picked[[members[j] for j in torch.randperm(len(members), generator=draw).tolist()[:count]]] = True
        found = few_shot_subset(labels, shots, protocol="dinov3", seed=7)
        assert found.tolist() == np.flatnonzero(picked).tolist()


def test_images_without_label_are_not_chosen():
    labels = CLASSES.clone()
    labels[[0, 1]] = -1
    for protocol in ("dinov2", "dinov3"):
        assert not {0, 1} & set(few_shot_subset(labels, 50, protocol=protocol).tolist())


@pytest.mark.parametrize(("n", "count"), [(10, 4), (1268, 100), (1339, 7), (97, 96), (5, 5), (3, 7)])
def test_radiology_takes_evenly_spaced_images(n, count):
    found = evenly_spaced(n, count).tolist()
    if count >= n:
        assert found == list(range(n))
    else:
        assert found == np.round(np.arange(0, n, n / count)).astype(int).tolist()
        assert len(set(found)) == count
    assert few_shot_subset(torch.zeros(n), count, protocol="radiology").tolist() == found


def test_rounding_errors_bring_no_image_that_is_not_there():
    for n in range(1, 400, 7):
        for count in range(1, n + 3):
            found = evenly_spaced(n, count).tolist()
            assert len(set(found)) == min(n, count)
            assert 0 <= found[0] <= found[-1] < n


def test_radiology_takes_the_first_patients_whose_images_share_a_label():
    #                       patient: 3       1       0    2       1
    labels = torch.tensor([[1, 0], [1, 1], [0, 1], [1, 0], [0, 1]]).float()
    patients = np.array([3, 1, 0, 2, 1])
    chosen = {k: few_shot_subset(labels, k, protocol="radiology", patients=patients).tolist() for k in (1, 2, 9)}
    # Label 0: patients 2 and 3 (one image of patient 1 has it not); label 1: patients 0 and 1.
    assert chosen == {1: [3, 2], 2: [3, 0, 2, 1, 4], 9: [3, 0, 2, 1, 4]}
    both = torch.tensor([[1, 1], [1, 0], [0, 1]]).float()
    # Patient 0 was brought by label 0, and for label 1 no other takes the place.
    assert few_shot_subset(both, 1, protocol="radiology", patients=np.arange(3)).tolist() == [0]
    classes = torch.tensor([4, 4, 7, 4, 7])
    assert few_shot_subset(classes, 1, protocol="radiology", patients=np.array([0, 1, 1, 2, 3])).tolist() == [0, 4]
    unknown = torch.tensor([[1.0], [float("nan")]])
    with pytest.raises(UsageError, match="no patient's images share a label"):
        few_shot_subset(unknown, 1, protocol="radiology", patients=np.zeros(2, dtype=int))


def test_label_sets_are_nested_and_balanced():
    labels = np.repeat([0, 1, 2], [10, 20, 3])
    few, more = nested_shots(labels, 2, seed=4), nested_shots(labels, 5, seed=4)
    assert set(few) < set(more)
    assert np.bincount(labels[more]).tolist() == [5, 5, 3]
    assert set(nested_shots(labels, 5, seed=5)) != set(more)
    assert few_shot_subset(labels, 5, protocol="nested", seed=4).tolist() == more.tolist()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"protocol": "dino"}, "did you mean dinov"),
        ({"shots": 0}, "shots is 0; dinov2 takes a whole number"),
        ({"shots": 0.5}, "dinov3 a share below 1 too"),
        ({"shots": 2.5, "protocol": "dinov3"}, "shots is 2.5"),
        ({"labels": several()}, "several labels each; take dinov3 or radiology"),
        ({"patients": np.zeros(17)}, "leave patients out, or take radiology"),
        ({"labels": torch.full((3,), -1)}, "none is labelled"),
    ],
)
def test_what_cannot_be_drawn_is_refused(arguments, message):
    with pytest.raises(UsageError, match=message):
        few_shot_subset(**{"labels": CLASSES, "shots": 2, **arguments})


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("data")
    return {"train": str(write_images(root / "train", 12)), "test": str(write_images(root / "test", 6, seed=1))}


@pytest.mark.parametrize("protocol", ["knn", "linear", "logistic", "linear_grid", "ordinal"])
def test_an_evaluation_learns_from_the_shots_alone(protocol, data):
    extra = {"steps": 20, "val": data["test"], "refit": True} if protocol == "linear_grid" else {}
    extra |= {"val": data["test"]} if protocol == "logistic" else {}
    found = pl.evaluate(protocol, encoder="pixels", image_size=8, shots=4, seed=2, **extra, **data, **QUICK)
    assert found["train_images"] == 12
    assert (found["shots"], found["shots_by"], found["n"]) == (4, "dinov2", 18)
    if protocol == "linear_grid":
        assert not found["refit"]  # validation images would make more of few shots


def test_knn_asks_no_more_neighbours_than_shots_and_as_many(data):
    settings = {"encoder": "pixels", "image_size": 8, "ks": [1, 3, 10], **data, **QUICK}
    found = pl.evaluate("knn", shots=4, **settings)
    assert (found["k"], list(found["accuracy_by_k"])) == (4, ["1", "3", "4"])
    assert found["score"] == found["accuracy_by_k"]["4"]
    other = pl.evaluate("knn", shots=0.25, shots_by="dinov3", **settings)
    assert (other["train_images"], list(other["accuracy_by_k"])) == (9, ["1", "3", "9"])
    tries = {pl.evaluate("knn", shots=1, seed=seed, **settings)["score"] for seed in range(6)}
    assert len(tries) > 1
    with pytest.raises(UsageError, match="measure on other images"):
        pl.evaluate("knn", shots=1, **{**settings, "test": data["train"]})


def test_shots_of_patients_come_from_their_file(data, tmp_path):
    with (tmp_path / "patients.csv").open("w", newline="") as handle:
        rows = csv.writer(handle)
        rows.writerow(["key", "group"])
        for colour in ("blue", "green", "red"):
            rows.writerows([f"{colour}/{number}.png", f"{colour} {number // 3}"] for number in range(12))
    settings = {"encoder": "pixels", "image_size": 8, "shots": 2, "shots_by": "radiology", **data, **QUICK}
    assert pl.evaluate("knn", **settings, patients=str(tmp_path / "patients.csv"))["train_images"] == 3 * 2 * 3
    assert pl.evaluate("knn", **settings)["train_images"] == 2
    with pytest.raises(UsageError, match="give shots, and shots_by=radiology"):
        pl.evaluate("knn", **{**settings, "shots": None}, patients=str(tmp_path / "patients.csv"))


def test_papers_draw_as_they_did():
    given = {"encoder": "pixels", "train": "a", "test": "b"}
    for preset in ("radiology", "dinov3"):
        assert config_from_mapping(LinearGridConfig, {**given, "preset": preset}).shots_by == preset
    assert config_from_mapping(MultiLabelConfig, {**given, "preset": "radiology"}).k == 5
