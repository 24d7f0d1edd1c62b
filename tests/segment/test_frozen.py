"""A decoder on an encoder that stays as it is: the steps written out, kept runs, few images."""

from __future__ import annotations

import copy
import signal

import pytest
import torch

import patchloom as pl
from patchloom.base.stopping import Stopped
from patchloom.encoders import create_encoder, intermediate_layers, normalize
from patchloom.errors import UsageError
from patchloom.evaluate.decoders import train_decoder
from patchloom.evaluate.segmentation import SegmentationConfig, open_pair
from patchloom.segment.build import build_parts
from patchloom.segment.frozen import FrozenMethod, SeveralEpochs
from patchloom.segment.losses import segmentation_loss
from patchloom.segment.schedule import poly
from segment_support import paint_pairs

FAST = {"steps": 12, "batch_size": 8, "lr": 2e-2, "num_workers": 0, "warmup": 2, "device": "cpu"}


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return create_encoder(
        "vit_tiny_patch16_224", image_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2
    ).eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("pairs")
    return str(paint_pairs(root / "train", 5)), str(paint_pairs(root / "test", 3, seed=1))


def settings(encoder, folders, **changed):
    return {"encoder": encoder, "train": folders[0], "test": folders[1], **FAST, "head": "linear", **changed}


def trained(encoder, folders, **changed):
    config = SegmentationConfig(**settings(encoder, folders, **changed))
    source = open_pair(config.train, config.test, 3)[0]
    return source, config, train_decoder(encoder, source, config, "segmentation")


def figures(encoder, folders, **changed):
    found = pl.evaluate("segmentation", **settings(encoder, folders, **changed))
    return {name: value for name, value in found.items() if not name.startswith("seconds")}


def test_kept_windows_are_learnt_from_by_the_steps_written_out(encoder, folders):
    source, config, found = trained(encoder, folders, augment=False)
    images, masks = [], []
    for sample in (source.read(index) for index in range(len(source))):
        image, mask = sample.image, sample.named["mask"]
        for top in (0, 8):  # images of 40 x 52
            for left in (0, 20):
                images.append(image[:, top : top + 32, left : left + 32])
                masks.append(mask[top : top + 32, left : left + 32])
    with torch.no_grad():
        tokens = intermediate_layers(encoder, normalize(torch.stack(images) / 255, encoder), (1,))[0].patches
    maps, masks = tokens.transpose(1, 2).unflatten(2, (4, 4)), torch.stack(masks).long()
    torch.manual_seed(0)
    head = build_parts(copy.deepcopy(encoder), 3, "linear").head
    optimizer = torch.optim.AdamW(head.parameters(), weight_decay=0.0)
    order, left = torch.Generator().manual_seed(0), []
    for step in range(config.steps):
        left = left or list(torch.randperm(20, generator=order).split(8))[:-1]
        chosen = left.pop(0)
        optimizer.param_groups[0]["lr"] = poly(step, 12, 2e-2, warmup=2)
        optimizer.zero_grad()
        loss = segmentation_loss(head([maps[chosen]]), masks[chosen])
        loss.backward()
        with torch.no_grad():  # decoupled decay, not of the bias
            head.conv_seg.weight.mul_(1 - optimizer.param_groups[0]["lr"] * config.weight_decay)
        optimizer.step()
    torch.testing.assert_close(found.module.head.state_dict(), head.state_dict(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("changed", [{"augment": False}, {"head": "dinov3", "batch_size": 4}])
def test_a_run_that_is_kept_goes_on_where_a_signal_stopped_it(encoder, folders, tmp_path, monkeypatch, changed):
    whole = figures(encoder, folders, **changed)
    loss = FrozenMethod.training_loss

    def stopped(method, batch):
        if method.step == 6:
            signal.raise_signal(signal.SIGTERM)
        return loss(method, batch)

    with monkeypatch.context() as patch:
        patch.setattr(FrozenMethod, "training_loss", stopped)
        with pytest.raises(Stopped):
            figures(encoder, folders, run=str(tmp_path / "run"), **changed)
    state = torch.load(tmp_path / "run/decoder/checkpoints/last.ckpt", weights_only=True)
    assert state["step"] == 7
    assert not any(name.startswith("encoder.") for name in state["state_dict"])
    assert figures(encoder, folders, run=str(tmp_path / "run"), **changed) == whole
    assert figures(encoder, folders, run=str(tmp_path / "run"), **changed) == whole  # nothing is left to train
    other = copy.deepcopy(encoder)
    other.norm.weight.data.mul_(2)
    with pytest.raises(UsageError, match="another encoder or other settings"):
        figures(other, folders, run=str(tmp_path / "run"), **changed)


def test_few_images_come_several_times_in_a_batch_with_other_crops(encoder, folders, monkeypatch):
    seen = []
    loss = FrozenMethod.training_loss
    monkeypatch.setattr(FrozenMethod, "training_loss", lambda *args: seen.append(args[1]) or loss(*args))
    trained(encoder, folders, steps=2)
    assert [len(batch["mask"]) for batch in seen] == [10, 10]  # 5 images, batches of 8
    assert all(sorted(batch["key"]) == sorted(2 * sorted(set(batch["key"]))) for batch in seen)
    views = torch.cat([batch["image"] for batch in seen]).flatten(1)
    assert len(views.unique(dim=0)) == 20


def test_several_epochs_begin_where_they_are_told_to():
    class Numbers:
        left_out = 0

        def __len__(self):
            return 1

        def set_position(self, epoch, batches_done=0):
            self.epoch = epoch

        def __iter__(self):
            number = torch.tensor([self.epoch])
            yield {"image": number, "mask": number, "key": [str(self.epoch)], "skipped": []}

    batches = SeveralEpochs(Numbers(), 3)
    batches.set_position(2)
    assert next(iter(batches))["key"] == ["6", "7", "8"]
