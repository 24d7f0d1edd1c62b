"""Features of signals and volumes, by an encoder of each that nothing here knows."""

from __future__ import annotations

import pytest
import torch

import patchloom as pl
from families_for_tests import CASES
from patchloom.data import MemorySource, Sample
from patchloom.data.kinds import KINDS, Kind
from patchloom.encoders import create_encoder, normalize
from patchloom.errors import UsageError
from patchloom.features.extract import extract
from patchloom.features.knn import knn_scores

CPU = {"batch_size": 4, "num_workers": 0, "device": "cpu", "progress": False}


class Whole(Kind):
    """A kind whose samples an encoder is shown as they are."""

    def eval_view(self, view, size):
        return lambda value, generator=None: {self.name: value}


@pytest.mark.parametrize("name", CASES)
def test_features_and_neighbours(name):
    module, size, patch, *_ = CASES[name]
    encoder = module(size, patch).eval()
    draw, classes = torch.Generator().manual_seed(0), torch.rand(3, 2, *size)
    samples = [
        Sample((classes[n % 3] + 0.05 * torch.randn(2, *size, generator=draw)).clamp(0, 1), n % 3, f"{n}")
        for n in range(11)
    ]
    source = MemorySource("memory", samples, ["a", "b", "c"])
    with pytest.raises(UsageError, match=f"memory holds images, and the encoder takes {name}s"):
        extract(encoder, source, **CPU)
    known = KINDS[name]
    source.kind = Whole(known.name, known.plural, known.axes)
    features = extract(encoder, source, **CPU)
    with torch.no_grad():
        expected = encoder(normalize(torch.stack([sample.value for sample in samples]), encoder))
    torch.testing.assert_close(features.vectors, expected)
    layered = extract(encoder, source, layers=[0, -1], pool="avg", **CPU)
    assert layered.vectors.shape == (11, 48)
    torch.testing.assert_close(layered.vectors[:, 24:], expected)
    scores = knn_scores(features.vectors[:6], features.labels[:6], features.vectors[6:], features.labels[6:], k=2)
    assert scores.accuracy == 1


@pytest.mark.parametrize("name", ["segmentation", "volumes", "volume_segmentation"])
def test_what_reads_images_alone_says_so_of_an_encoder_of_clips(name, tmp_path):
    encoder = create_encoder("videomae_tiny_patch16_224", image_size=(4, 32, 32), depth=1)
    with pytest.raises(UsageError, match=f"the encoder takes clips, and evaluate {name} is for encoders of images"):
        pl.evaluate(name, encoder=encoder, train=str(tmp_path), test=str(tmp_path))
