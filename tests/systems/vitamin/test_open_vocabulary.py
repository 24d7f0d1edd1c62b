"""Masks named by words, by formulas written out."""

import pytest
import timm
import torch
import torch.nn.functional as F

pytest.importorskip("open_clip")

from patchloom.errors import UsageError
from patchloom.systems.clip.model import CLIP
from patchloom.systems.clip.text import TextTower
from patchloom.systems.clip.zero_shot import text_features
from patchloom.systems.vitamin.model import SlidingWindowFeatures, ViTaminTower
from patchloom.systems.vitamin.open_vocabulary import OpenVocabularyMaskClassifier, fused, mask_pooled


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    trunk = timm.create_model("vitamin_tiny_64", num_classes=0)
    text = TextTower(context_length=16, width=32, heads=2, layers=1, output_dim=24)
    with torch.no_grad():
        for parameter in trunk.fc_norm.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return CLIP(trunk, text, tower=ViTaminTower).eval()


def test_a_mask_of_everything_is_the_image(model):
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        dense = SlidingWindowFeatures(model.visual.trunk)(images)["dense"]
        found = OpenVocabularyMaskClassifier(model, ["sky"]).mask_features(dense, torch.ones(2, 1, 64, 64))
        torch.testing.assert_close(found[:, 0], model.encode_image(images, normalize=True), atol=1e-5, rtol=0)


def test_features_are_means_inside_the_binarised_mask():
    dense = torch.randn(1, 3, 2, 2)
    masks = torch.tensor([[[[1.0, -5], [0.2, 0]], [[-1, -1], [-1, -1]]]])
    pooled = mask_pooled(dense, masks)
    torch.testing.assert_close(pooled[0, 0], dense[0, :, :, 0].mean(1))
    assert pooled[0, 1].abs().max() == 0


@torch.no_grad()
def test_the_best_synonym_counts(model):
    templates = ("a {}.", "the {} in the scene")
    classifier = OpenVocabularyMaskClassifier(model, ["road, street", "sky"], templates)
    dense, masks = torch.randn(1, 96, 4, 4), torch.ones(1, 2, 4, 4)
    masks[0, 1, :2] = 0
    logits = classifier(dense, masks)
    words = []
    for name in ("road", "street", "sky"):
        features = text_features(model, [template.format(name) for template in templates])
        words.append(F.normalize(features.mean(0), dim=0))
    cosines = classifier.mask_features(dense, masks) @ torch.stack(words).T
    expected = torch.stack([cosines[..., :2].max(-1).values, cosines[..., 2]], -1) * model.logit_scale.exp()
    torch.testing.assert_close(logits, expected)


def test_two_opinions_are_one_by_the_geometric_mean():
    torch.manual_seed(0)
    decoder, words = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    seen = torch.tensor([True, False, True, False])
    p, q, v = decoder[:, :4].softmax(1), words.softmax(1), decoder.softmax(1)[:, 4:]
    share = torch.tensor([0.45, 0.7, 0.45, 0.7], dtype=torch.float64)
    g = p ** (1 - share) * q**share
    expected = torch.cat([g / g.sum(1, keepdim=True) * (1 - v), v], 1)
    torch.testing.assert_close(fused(decoder, words, seen).exp(), expected, atol=1e-6, rtol=0)
    only_words = fused(decoder, words, seen, 1.0, 1.0).exp()[:, :4]
    torch.testing.assert_close(only_words / only_words.sum(1, keepdim=True), q, atol=1e-6, rtol=0)


def test_pixels_get_the_class_of_their_surest_mask(model):
    classifier = OpenVocabularyMaskClassifier(model, ["sky", "road", "grass"])
    masks = torch.zeros(1, 2, 64, 64)
    masks[0, 0, :32], masks[0, 1, 16:48] = 1, 1
    dense = torch.randn(1, 96, 4, 4)
    named = classifier.semantic(dense, masks)
    probabilities, classes = classifier(dense, masks).softmax(-1)[0].max(-1)
    assert named[0, 0, 0] == classes[0]
    assert named[0, 40, 0] == classes[1]
    assert named[0, 20, 0] == classes[int(probabilities.argmax())]
    assert (named[0, 48:] == 255).all()


def test_what_does_not_belong_together_is_refused(model):
    with pytest.raises(UsageError, match="seen names 'tree'"):
        OpenVocabularyMaskClassifier(model, ["sky"], seen=["tree"])
    with pytest.raises(UsageError, match=r"alpha is 2; it must be from 0 to 1"):
        OpenVocabularyMaskClassifier(model, ["sky"], alpha=2)
    with pytest.raises(UsageError, match="no class to name masks by"):
        OpenVocabularyMaskClassifier(model, [])
    classifier = OpenVocabularyMaskClassifier(model, ["sky", "road"])
    with pytest.raises(UsageError, match="these are"):
        classifier(torch.zeros(1, 96, 4, 4), torch.zeros(2, 1, 4, 4))
    with pytest.raises(UsageError, match=r"need \(1, 1, 3\)"):
        classifier(torch.zeros(1, 96, 4, 4), torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 2))
