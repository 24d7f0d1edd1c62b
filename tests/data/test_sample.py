"""A sample is a value and what is named beside it; a transform says what it reads."""

from __future__ import annotations

import pickle

import pytest
import torch

from patchloom.data import MemorySource, make_loader
from patchloom.data.sample import Sample, WithNamed, transformed
from patchloom.data.transforms import EvalTransform
from patchloom.errors import UsageError

IMAGE = torch.zeros(3, 8, 8, dtype=torch.uint8)


def test_named_tensors_and_text_are_batched_beside_the_views():
    samples = [Sample(IMAGE, n, str(n), {"spacing": torch.tensor([float(n)] * 3), "text": "x" * n}) for n in range(3)]
    view = WithNamed(EvalTransform(8), "spacing", "text")
    batch = next(iter(make_loader(MemorySource("made", samples), view, 3, shuffle=False, num_workers=0)))
    assert batch["image"].shape == (3, 3, 8, 8)
    assert batch["spacing"][:, 0].tolist() == [0, 1, 2]
    assert batch["text"] == ["", "x", "xx"]


def test_a_transform_is_not_handed_what_it_does_not_read():
    sample = Sample(IMAGE, 0, "a", {"mask": IMAGE[0]})
    assert set(transformed(EvalTransform(8), sample, torch.Generator())) == {"image"}


def test_what_a_transform_reads_and_a_sample_lacks_is_named():
    with pytest.raises(UsageError, match=r"'a\.png' has no mask"):
        transformed(WithNamed(EvalTransform(8), "mask"), Sample(IMAGE, 0, "a.png"), torch.Generator())


def test_samples_travel_to_workers():
    again = pickle.loads(pickle.dumps(Sample(IMAGE, 1, "a", {"mask": IMAGE[0]})))
    assert (again.label, again.key, set(again.named)) == (1, "a", {"mask"})


def test_what_asks_for_an_image_gets_no_clip():
    with pytest.raises(UsageError, match="'a' has 4 axes in place of three"):
        _ = Sample(torch.zeros(3, 2, 8, 8), 0, "a").image
