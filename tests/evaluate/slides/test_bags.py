"""Labels meet features by the names of slides; what does not fit is named."""

from __future__ import annotations

import numpy as np
import pytest

from patchloom.errors import UsageError
from patchloom.evaluate.slides.bags import read_cohort
from patchloom.evaluate.slides.store import TileStore


def make_store(path, names, width=6, tiles=5):
    store = TileStore(path, {"encoder": "made up"})
    for number, name in enumerate(names):
        features = np.random.default_rng(number).normal(size=(tiles, width)).astype(np.float32)
        store.write(name, 3, np.stack([np.arange(tiles), np.zeros(tiles, int)], 1), features, {"tiles": tiles})
    return store


@pytest.fixture
def store(tmp_path):
    return make_store(tmp_path / "features", [f"s{number}" for number in range(6)])


def table(tmp_path, text: str) -> str:
    path = tmp_path / "labels.csv"
    path.write_text(text)
    return str(path)


def test_labels_and_patients(store, tmp_path):
    text = "slide,label,patient\ns0.svs,yes,p1\ns1,no,p2\ns2,yes,p1\ns3,no,\ns4,,p3\nother,no,p4\n"
    with pytest.warns(UserWarning, match=r"left out, since it"):
        cohort = read_cohort(store.path, table(tmp_path, text))
    assert cohort.names == ["s0", "s1", "s2", "s3"]
    assert cohort.labels.tolist() == [1, 0, 1, 0]
    assert cohort.patients == ["p1", "p2", "p1", "s3"]
    assert (cohort.task.kind, cohort.task.classes, cohort.width) == ("binary", ("no", "yes"), 6)
    assert cohort.left_out == {
        "has a label, but no features": ["other"],
        "has features, but no label": ["s5"],
        "has an empty label": ["s4"],
    }
    with pytest.warns(UserWarning, match=r"has a label that stands for a missing one: s1"):
        assert read_cohort(
            store.path, table(tmp_path, text.replace("s1,no", "s1,NA")), missing="?,NA"
        ).task.classes == (
            "no",
            "yes",
        )
    patients, labels, scores = cohort.per_patient(np.array([0.2, 0.5, 0.4, 0.9]))
    assert (patients, labels.tolist()) == (["p1", "p2", "s3"], [1, 0, 0])
    np.testing.assert_allclose(scores, [0.3, 0.5, 0.9])


@pytest.mark.filterwarnings("ignore:left out")
def test_kinds_of_task(store, tmp_path):
    numbers = table(tmp_path, "slide,label\ns0,10\ns1,2\ns2,10\ns3,2\ns4,3\ns5,3\n")
    cohort = read_cohort(store.path, numbers)
    assert (cohort.task.kind, cohort.task.classes) == ("multiclass", ("2", "3", "10"))
    assert read_cohort(store.path, numbers, kind="survival").labels.tolist() == [10, 2, 10, 2, 3, 3]
    two = table(tmp_path, "slide,label\ns0,b\ns1,a\n")
    assert read_cohort(store.path, two, classes=["b", "a"]).labels.tolist() == [0, 1]
    assert read_cohort(store.path, two, kind="multiclass").task.out_features == 2


@pytest.mark.filterwarnings("ignore:left out")
def test_large_slides_are_drawn_from(tmp_path):
    store = make_store(tmp_path / "features", ["s0", "s1"], tiles=40)
    labels = table(tmp_path, "slide,label\ns0,a\ns1,b\n")
    drawn = read_cohort(store.path, labels, n_tiles=10)
    again = read_cohort(store.path, labels, n_tiles=10)
    first = read_cohort(store.path, labels, n_tiles=10, choice="first")
    everything = read_cohort(store.path, labels, n_tiles=None)
    assert [len(bag) for bag in drawn.bags] == [10, 10]
    assert (drawn.places[0] == again.places[0]).all()
    assert not (drawn.places[0] == drawn.places[1]).all()
    assert first.places[0][:, 0].tolist() == list(range(10))
    assert len(everything.bags[0]) == 40
    np.testing.assert_array_equal(drawn.bags[0], everything.bags[0][drawn.places[0][:, 0]])


@pytest.mark.filterwarnings("ignore:left out")
@pytest.mark.parametrize(
    ("text", "settings", "message"),
    [
        ("slide,grade\ns0,a\n", {}, "has no column 'label'; its columns are slide, grade"),
        ("", {}, "its columns are none"),
        ("slide,label\nx,a\ny,b\n", {}, "no slide of .* has features .* names 'x', the features are of 's0'"),
        ("slide,label\ns0,a\ns0,b\n", {}, "labels slide s0 both 'a' and 'b'"),
        ("slide,label,patient\ns0,a,p\ns1,b,p\n", {}, "slides of patient p have the labels 'a' and 'b'"),
        ("slide,label\ns0,a\ns1,a\n", {}, "the class 'a' only"),
        ("slide,label\ns0,a\ns1,b\n", {"classes": ["a", "c"]}, "the class 'b', which is not among a, c"),
        ("slide,label\ns0,a\ns1,b\ns2,c\ns3,a\ns4,b\ns5,c\n", {"kind": "binary"}, "the task is multiclass"),
        ("slide,label\ns0,1.5\ns1,2.5\ns2,3.5\n", {}, "3 classes for 3 slides; for times set task to survival"),
        ("slide,label\ns0,1.5\ns1,soon\n", {"kind": "survival"}, "survival times are numbers"),
        ("slide,label\ns0,1.5\ns1,0\n", {"kind": "survival"}, "a survival time of 0"),
    ],
)
def test_tables_that_cannot_be_used(store, tmp_path, text, settings, message):
    with pytest.raises(UsageError, match=message):
        read_cohort(store.path, table(tmp_path, text), **settings)


@pytest.mark.filterwarnings("ignore:left out")
def test_features_that_cannot_be_used(store, tmp_path):
    labels = table(tmp_path, "slide,label\ns0,a\ns1,b\n")
    with pytest.raises(UsageError, match="there is no table of labels"):
        read_cohort(store.path, tmp_path / "none.csv")
    lost = np.ones((3, 9), np.float32)
    lost[1, 5] = np.nan
    np.save(store.path / "s1" / "features.npy", lost)
    with pytest.raises(UsageError, match=r"features of slide s1 .* are not finite"):
        read_cohort(store.path, labels)
    np.save(store.path / "s1" / "features.npy", np.ones((3, 12), np.float32))
    with pytest.raises(UsageError, match=r"features of widths \[6, 9\]"):
        read_cohort(store.path, labels)
    np.save(store.path / "s1" / "features.npy", np.ones((0, 9), np.float32))
    with pytest.raises(UsageError, match="has no tiles"):
        read_cohort(store.path, labels)
