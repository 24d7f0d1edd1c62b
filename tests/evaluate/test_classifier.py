"""A classifier as it stands: the mean of its answers over clips and crops, images too, what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

import patchloom as pl
from patchloom.data import open_source
from patchloom.data.clip_views import SideCrops
from patchloom.encoders import create_encoder, normalize
from patchloom.errors import UsageError

CPU = {"num_workers": 0, "device": "cpu", "batch_size": 4}


def classifier(name="videomae_tiny_patch16_224", size=(4, 16, 16), **settings):
    model = create_encoder(name, image_size=size, depth=1, patch_size=8, **settings).eval()
    model.reset_classifier(2)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    model.pretrained_cfg = {**model.pretrained_cfg, "label_names": ["a", "b"]}
    return model


@pytest.fixture
def videos(tmp_path):
    rng = np.random.default_rng(0)
    for number in range(6):
        folder = tmp_path / "clips" / "ab"[number % 2] / str(number)
        folder.mkdir(parents=True)
        for time in range(20):
            Image.fromarray(rng.integers(0, 255, (24, 40, 3), dtype=np.uint8)).save(folder / f"{time}.png")
    return f"clips:{tmp_path / 'clips'}"


def test_probabilities_are_averaged_over_clips_and_crops(videos, tmp_path):
    model = classifier()
    figures = pl.evaluate("classifier", encoder=model, test=videos, clips=3, crops=3, clip_stride=2,
                          predictions=str(tmp_path / "p.npz"), **CPU)  # fmt: skip
    source = open_source(videos, clip_frames=4, clip_stride=2)
    right = 0
    for index in range(6):
        told = []
        for sample in source.views(index, 3):
            # 24 x 40 becomes 16 x 27; three crops along the longer side.
            views = SideCrops(16, 3)(sample.value[None])["clip"]
            assert views.shape == (3, 3, 4, 16, 16)
            told += [model(normalize(view[None] / 255, model)).softmax(1) for view in views]
        assert len(told) == 9
        right += int(torch.cat(told).mean(0).argmax()) == source.labels[index]
    assert figures["accuracy"] == pytest.approx(right / 6)
    assert figures["views"] == 9
    assert figures["top5"] == 1.0
    assert (tmp_path / "p.npz").exists()


def test_crops_lie_at_both_ends_and_in_the_middle():
    clip = torch.arange(40, dtype=torch.float32).expand(1, 3, 2, 16, 40) / 40
    ends = SideCrops(16, 3)(clip)["clip"][:, 0, 0, 0] * 40
    assert ends[:, 0].tolist() == pytest.approx([0, 12, 24])
    assert ends[:, -1].tolist() == pytest.approx([15, 27, 39])
    assert SideCrops(16, 1)(clip)["clip"][0, 0, 0, 0, 0] * 40 == pytest.approx(12)
    tall = SideCrops(16, 3)(clip.transpose(-1, -2))["clip"][:, 0, 0, :, 0] * 40
    assert tall[:, 0].tolist() == pytest.approx([0, 12, 24])


def test_one_view_is_the_one_of_every_evaluation(videos):
    model = classifier()
    figures = pl.evaluate("classifier", encoder=model, test=videos, clip_stride=2, **CPU)
    source = open_source(videos, clip_frames=4, clip_stride=2)
    view = source.kind.eval_view("crop", (4, 16, 16))
    answers = [int(model(normalize(view(source.read(n).value)["clip"][None] / 255, model)).argmax()) for n in range(6)]
    assert figures["accuracy"] == pytest.approx(float((np.array(answers) == source.labels).mean()))


def test_images_are_measured_too_but_have_no_clips(tmp_path):
    for number in range(4):
        folder = tmp_path / "ab"[number % 2]
        folder.mkdir(exist_ok=True)
        Image.new("RGB", (20, 20), (60 * number,) * 3).save(folder / f"{number}.png")
    model = classifier("vit_tiny_patch16_224", 16)
    assert pl.evaluate("classifier", encoder=model, test=str(tmp_path), **CPU)["n"] == 4
    with pytest.raises(UsageError, match="clips and crops are of videos"):
        pl.evaluate("classifier", encoder=model, test=str(tmp_path), crops=3, **CPU)


def test_what_cannot_be_measured_is_refused(videos):
    model = classifier()
    model.pretrained_cfg = {**model.pretrained_cfg, "label_names": ["a", "c"]}
    with pytest.raises(UsageError, match="does not know the class b"):
        pl.evaluate("classifier", encoder=model, test=videos, **CPU)
    model.pretrained_cfg.pop("label_names")
    with pytest.raises(UsageError, match="is no classifier"):
        pl.evaluate("classifier", encoder=model, test=videos, **CPU)
    with pytest.raises(UsageError, match=r"holds images, and the encoder takes clips"):
        pl.evaluate("classifier", encoder=classifier(), test="photos:test", **CPU)
