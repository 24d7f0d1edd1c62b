"""Which images are learnt from: budgets per class, held-out parts, groups that stay together."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from patchloom.data import open_source
from patchloom.data.base import Sample
from patchloom.data.subset import MemorySource, SubsetSource
from patchloom.errors import UsageError
from patchloom.training.long_tail import long_tail_counts, long_tail_subset
from patchloom.training.selection import class_counts, hold_out, limit_labels, long_tailed


def source_of(labels, names=("a", "b", "c")):
    image = torch.zeros(3, 4, 4, dtype=torch.uint8)
    return MemorySource("made", [Sample(image, int(y), f"{i}.png") for i, y in enumerate(labels)], list(names))


LABELS = [0] * 50 + [1] * 30 + [2] * 20


def test_every_class_is_held_out_alike_and_nothing_is_on_both_sides():
    learnt, held = hold_out(source_of(LABELS), 0.2, seed=3)
    assert np.bincount(held.labels).tolist() == [10, 6, 4]
    assert not set(learnt.indices) & set(held.indices)
    assert len(learnt) + len(held) == 100
    again = hold_out(source_of(LABELS), 0.2, seed=3)[1]
    assert np.array_equal(again.indices, held.indices)


def test_groups_stay_together(tmp_path):
    source = source_of(LABELS)
    file = tmp_path / "groups.csv"
    rows = [f"{source.key(i)},patient{i % 11}" for i in range(100)]
    file.write_text("\n".join(["key,group", *rows]))
    learnt, held = hold_out(source, 0.2, seed=0, groups=str(file))
    groups = [{index % 11 for index in part.indices} for part in (learnt, held)]
    assert groups[1]
    assert not groups[0] & groups[1]
    assert 10 <= len(held) <= 30


def test_group_files_that_do_not_fit_are_refused(tmp_path):
    source, file = source_of(LABELS), tmp_path / "groups.csv"
    with pytest.raises(UsageError, match="no group file"):
        hold_out(source, 0.2, 0, str(file))
    file.write_text("image,patient\n")
    with pytest.raises(UsageError, match="it needs key"):
        hold_out(source, 0.2, 0, str(file))
    file.write_text("key,group\n0.png,x\n")
    with pytest.raises(UsageError, match="no group for 99 of 100 images, such as 1"):
        hold_out(source, 0.2, 0, str(file))
    file.write_text("key,group\n" + "\n".join(f"{i}.png,x" for i in range(100)))
    with pytest.raises(UsageError, match="one group"):
        hold_out(source, 0.2, 0, str(file))


def test_budgets_are_met_per_class_and_larger_ones_contain_smaller_ones():
    source = source_of(LABELS)
    tenth = limit_labels(source, fraction=0.1, seed=1)
    assert np.bincount(tenth.labels).tolist() == [5, 3, 2]
    third = limit_labels(source, fraction=0.3, seed=1)
    assert np.bincount(third.labels).tolist() == [15, 9, 6]
    assert set(tenth.indices) <= set(third.indices)
    five = limit_labels(source, shots=5, seed=1)
    assert np.bincount(five.labels).tolist() == [5, 5, 5]
    assert limit_labels(source) is source


def test_too_few_images_of_a_class_are_named():
    with pytest.raises(UsageError, match="the class c has 20 images to learn from, fewer than shots=21"):
        limit_labels(source_of(LABELS), shots=21)
    with pytest.raises(UsageError, match="no image to learn from shows c"):
        class_counts(source_of([0, 1, 0]))
    assert class_counts(source_of([0, 1, 0, 2])).tolist() == [2, 1, 1]
    with pytest.raises(UsageError, match="too few to hold out"):
        hold_out(source_of([0]), 0.9, 0)


def test_real_images_can_be_split():
    learnt, held = hold_out(open_source("digits"), 0.1, 0)
    assert isinstance(learnt, SubsetSource)
    assert len(np.unique(held.labels)) == 10


def test_long_tails_are_the_published_ones_and_the_same_for_every_seed():
    labels = np.repeat(np.arange(10), 500)
    source = source_of(labels, [str(c) for c in range(10)])
    made = long_tailed(source, 100)
    assert class_counts(made).tolist() == long_tail_counts(10, 500, 100)
    assert sorted(long_tail_subset(labels, long_tail_counts(10, 500, 100))) == made.indices.tolist()
    assert class_counts(long_tailed(source, 5, "step")).tolist() == [500] * 5 + [100] * 5
    assert class_counts(long_tailed(source, 1)).tolist() == [500] * 10


def test_a_long_tail_fits_classes_that_are_unequal_already():
    source = source_of(np.repeat([0, 1, 2], [30, 100, 40]))
    assert class_counts(long_tailed(source, 4)).tolist() == [30, 15, 7]
    source = source_of(np.repeat([0, 1, 2], [100, 20, 90]))
    assert class_counts(long_tailed(source, 4)).tolist() == [40, 20, 10]


def test_long_tails_that_cannot_be_are_refused():
    with pytest.raises(UsageError, match="imbalance 100 leaves the rarest class none of 40 images; 40 is the most"):
        long_tailed(source_of([0] * 40 + [1] * 40, "ab"), 100)
    several = source_of([0, 1], "ab")
    several.labels = np.zeros((2, 2), np.float32)
    with pytest.raises(UsageError, match="several labels per image"):
        long_tailed(several, 2)
