"""What every tokenizer answers, by a tiny learned one and by centroids alike."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from patchloom import registry
from patchloom.encoders.patches import patchify, unpatchify
from patchloom.errors import UsageError
from patchloom.io import write_json
from patchloom.tokenizers import CentroidTokenizer, Tokenizer, open_tokenizer
from patchloom.tokenizers.tokenizer import ABOUT, use_of


class Grey(Tokenizer):
    """A patch's token is its mean in steps of 1 / 8."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_size, self.in_chans, self.facts = 4, 3, {}
        self.drop = nn.Dropout(0.5).eval()

    @property
    def num_codes(self) -> int:
        return 8

    def encode(self, images: Tensor) -> Tensor:
        self.check_images(images)
        h, w = self.grid_size((images.shape[2], images.shape[3]))
        return (self.drop(patchify(images, 4)).mean(-1) * 8).long().clamp(max=7).view(-1, h, w)

    def decode(self, ids: Tensor) -> Tensor:
        self.check_ids(ids)
        grey = ((ids.flatten(1) + 0.5) / 8)[..., None].expand(-1, -1, 48)
        return unpatchify(grey, 4, (ids.shape[1], ids.shape[2]), 3)

    def fingerprint(self) -> str:
        return "grey"

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        Path(path).mkdir()
        write_json(Path(path) / ABOUT, {"kind": "grey"})
        return Path(path)


def load_grey(folder: Path) -> Grey:
    return Grey()


class Blind(Grey):
    decodes = False
    decode = Tokenizer.decode


def test_pasting_replaces_marked_patches_by_what_their_tokens_stand_for_and_no_others():
    tokenizer, images = Grey(), torch.rand(2, 3, 8, 12)
    mask = torch.rand(2, 2, 3) < 0.5
    pasted = tokenizer.replace(images, mask)
    whole = mask.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None].expand_as(images)
    assert torch.equal(pasted[~whole], images[~whole])
    assert torch.equal(pasted[whole], tokenizer.decode(tokenizer.encode(images))[whole])
    assert torch.equal(tokenizer.replace(images, mask, tokenizer.encode(images).flatten(1)), pasted)


def test_the_general_way_to_paste_is_that_of_centroids():
    tokenizer, images = CentroidTokenizer(torch.rand(9, 48), 4), torch.rand(2, 3, 8, 8)
    mask = torch.rand(2, 4) < 0.5
    torch.testing.assert_close(Tokenizer.replace(tokenizer, images, mask), tokenizer.replace(images, mask))


def test_figures_are_those_of_the_definitions():
    tokenizer, images = Grey(), torch.rand(3, 3, 8, 8)
    found = tokenizer.report(images)
    decoded = tokenizer.decode(tokenizer.encode(images))
    assert found["mse"] == pytest.approx(float((images - decoded).double().square().mean()))
    counts = torch.bincount(tokenizer.encode(images).flatten(), minlength=8)
    shares = counts[counts > 0] / 12
    assert found["perplexity"] == pytest.approx(float((-(shares * shares.log()).sum()).exp()), rel=1e-6)
    assert found["dead"] == int((counts == 0).sum())
    assert found["usage"] == pytest.approx(1 - found["dead"] / 8)
    assert "psnr" not in Blind().report(images)


def test_use_of_one_code_is_a_perplexity_of_one():
    assert use_of(torch.tensor([0, 5, 0, 0])) == {"usage": 0.25, "perplexity": 1.0, "dead": 3}


def test_tokens_are_not_drawn_while_something_around_trains():
    around = nn.ModuleList([Grey()]).train()
    images = torch.rand(1, 3, 8, 8)
    assert torch.equal(around[0].encode(images), around[0].encode(images))


def test_tokenizers_of_both_sorts_open_from_disk(tmp_path, monkeypatch):
    monkeypatch.setitem(registry.TOKENIZERS, "grey", "unused")
    monkeypatch.setattr(registry, "load", lambda place: load_grey)
    Grey().save(tmp_path / "model")
    assert isinstance(open_tokenizer(tmp_path), Grey)  # a run stands for its model
    centroids = CentroidTokenizer(torch.rand(5, 48), 4)
    centroids.save(tmp_path / "book.safetensors")
    assert open_tokenizer(tmp_path / "book.safetensors").fingerprint() == centroids.fingerprint()


def test_sizes_and_grids_tell_each_other():
    tokenizer = Grey()
    assert tokenizer.grid_size((8, 12)) == (2, 3)
    assert tokenizer.image_size((2, 3)) == (8, 12)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda t: t.encode(torch.rand(1, 3, 8, 8) * 3 - 1), "looks normalised"),
        (lambda t: t.encode(torch.full((1, 3, 8, 8), torch.nan)), "in \\[0, 1\\]"),
        (lambda t: t.encode(torch.rand(1, 1, 8, 8)), r"takes images \(B, 3, H, W\)"),
        (lambda t: t.encode(torch.rand(1, 3, 8, 9)), "not divisible by patch size 4"),
        (lambda t: t.decode(torch.full((1, 2, 2), 8)), "token ids from 8 to 8; this codebook has 0 to 7"),
        (lambda t: t.decode(torch.zeros(4, dtype=torch.long)), r"token ids are \(B, h, w\)"),
        (lambda t: t.check_fits(16, 3), "tokenizer is of patch size 4, the encoder of patch size 16"),
        (lambda t: t.check_fits(4, 1), "images with 3 channels, the encoder takes 1"),
        (lambda t: Blind().decode(torch.zeros(1, 2, 2, dtype=torch.long)), "makes tokens of images, and no images"),
    ],
)
def test_what_cannot_be_tokenised_is_refused(act, message):
    with pytest.raises(UsageError, match=message):
        act(Grey())


@pytest.mark.parametrize("about", ["{", json.dumps({"kind": "unheard of"}), json.dumps([])])
def test_a_damaged_or_unknown_tokenizer_is_named(tmp_path, about):
    (tmp_path / ABOUT).write_text(about)
    with pytest.raises(UsageError, match=r"damaged|kind of tokenizer"):
        open_tokenizer(tmp_path)


def test_the_error_is_that_of_the_tokens_given_not_of_the_nearest():
    tokenizer, images = CentroidTokenizer(torch.rand(9, 48), 4), torch.rand(3, 3, 8, 8)
    ids = torch.randint(9, (3, 2, 2))
    expected = float((images - tokenizer.decode(ids)).double().square().sum())
    assert tokenizer.squared_error(images, ids) == pytest.approx(expected, rel=1e-5)
    assert tokenizer.squared_error(images, tokenizer.encode(images)) == tokenizer.inertia(images)
