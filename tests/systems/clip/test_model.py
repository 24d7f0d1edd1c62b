"""Towers and text: open_clip's tokens and features, chunks of a batch."""

import socket

import pytest
import timm
import torch

pytest.importorskip("open_clip")

import open_clip
from open_clip.transformer import TextTransformer

from patchloom.systems.clip.losses import contrastive_loss
from patchloom.systems.clip.model import CLIP, chunked
from patchloom.systems.clip.text import TextTower, tokenize, tokenize_all

SHAPE = {"context_length": 24, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2, "output_dim": 16}


def towers(seed=0, trunk="vitamin_tiny_32"):
    torch.manual_seed(seed)
    return CLIP(timm.create_model(trunk, num_classes=0), TextTower(**SHAPE)).double()


CAPTIONS = ["A cat!", "two dogs, on a sofa", "", "été — naïve café 🐈", "&amp; <html>", "a " * 100, "don't 42"]


def test_tokens_are_open_clips_and_long_captions_are_cut(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("nothing is to be fetched")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    expected = open_clip.SimpleTokenizer(context_length=24)(CAPTIONS)
    torch.testing.assert_close(tokenize_all(CAPTIONS, 24), expected)
    assert [bool(tokenize(caption, 24).cut) for caption in CAPTIONS] == [False] * 5 + [True, False]


def test_captions_have_one_number_where_their_tokens_are_the_same():
    numbers = [int(tokenize(caption, 24).text_id) for caption in ("A cat", "a  cat", "a dog")]
    assert numbers[0] == numbers[1] != numbers[2]


def test_features_of_a_batch_cut_at_its_longest_caption_are_those_of_open_clip():
    torch.manual_seed(0)
    tower = TextTower(**SHAPE).eval()
    reference = TextTransformer(**SHAPE).eval()
    reference.load_state_dict(tower.state_dict())
    tokens = tokenize_all(CAPTIONS[:5], 24)
    model = CLIP(timm.create_model("vitamin_tiny_32", num_classes=0), tower)
    with torch.no_grad():
        torch.testing.assert_close(model.encode_text(tokens), reference(tokens), atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [1, 3, 4])
def test_gradients_of_chunks_are_those_of_the_whole_batch(size):
    images = torch.randn(6, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    tokens = tokenize_all(["a cat", "a dog", "a cat", "a very small bird", "two boats", "a tree"], 24)
    gradients = []
    for rows in (None, size):
        model = towers()
        image_features = chunked(lambda x, m=model: m.encode_image(x, normalize=True), images, size=rows)
        text_features = model.encode_text(tokens, normalize=True, chunk_size=rows)
        ids = torch.tensor([0, 1, 0, 2, 3, 4])
        contrastive_loss(image_features, text_features, model.logit_scale.exp(), ids).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, atol=1e-9, rtol=1e-9, msg=name)


def test_only_one_chunk_is_kept_at_a_time():
    """Of n chunks, saved tensors are those of their inputs; the activations of one are there in the backward pass."""
    model = towers()
    images = torch.randn(8, 3, 32, 32, dtype=torch.float64)
    kept = []

    def note(tensor):
        kept.append(tensor.numel())
        return tensor

    sizes = {}
    for rows in (None, 2):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            chunked(model.encode_image, images, size=rows)
        sizes[rows] = sum(kept)
    assert sizes[2] < sizes[None] / 10


def test_the_scale_stays_in_its_bounds():
    model = towers()
    with torch.no_grad():
        model.logit_scale.fill_(9.0)
    model.clamp_scale(100.0)
    assert float(model.logit_scale.detach().exp()) == pytest.approx(100.0)
    with torch.no_grad():
        model.logit_scale.fill_(-3.0)
    model.clamp_scale()
    assert float(model.logit_scale.detach().exp()) == 1.0
