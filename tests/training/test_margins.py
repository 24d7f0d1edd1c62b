"""LDAM against its formula written out, and plain classifiers that decide as cosines do."""

from __future__ import annotations

import pytest
import timm
import torch

from patchloom.errors import UsageError
from patchloom.training.margins import LDAM, classify_by_angle_, cosines, has_linear_head


@pytest.mark.parametrize("weighted", [False, True])
def test_the_loss_is_the_formula(weighted):
    torch.manual_seed(0)
    counts = [1000, 70, 3]
    cosine = torch.rand(6, 3, dtype=torch.float64) * 2 - 1
    labels = torch.tensor([0, 1, 2, 2, 0, 1])
    weights = torch.tensor([0.2, 1.0, 1.8], dtype=torch.float64)
    loss = LDAM(counts, max_margin=0.4, scale=12.0).double()
    raw = [n**-0.25 for n in counts]
    margins = torch.tensor([0.4 * value / max(raw) for value in raw], dtype=torch.float64)
    torch.testing.assert_close(loss.margins, margins, rtol=1e-6, atol=0)
    losses = []
    for row, label in zip(cosine, labels.tolist(), strict=True):
        z = 12.0 * row.clone()
        z[label] = 12.0 * (row[label] - margins[label])
        losses.append(float(z.logsumexp(0) - z[label]))
    w = weights[labels] if weighted else torch.ones(6, dtype=torch.float64)
    expected = float((w * torch.tensor(losses, dtype=torch.float64)).sum() / w.sum())
    found = loss(cosine, labels, weights if weighted else None)
    assert float(found) == pytest.approx(expected, rel=1e-6)


def test_unknown_labels_are_left_out_and_empty_classes_refused():
    cosine = torch.tensor([[0.5, -0.5], [0.9, 0.1]])
    loss = LDAM([10, 2])
    assert float(loss(cosine, torch.tensor([0, -1]))) == pytest.approx(float(loss(cosine[:1], torch.tensor([0]))))
    with pytest.raises(UsageError, match="class 1 has no training image"):
        LDAM([10, 0])


@pytest.mark.parametrize("name", ["resnet10t", "vit_tiny_patch16_224"])
def test_a_plain_classifier_decides_as_its_cosines_do(name):
    torch.manual_seed(0)
    small = {} if name.startswith("resnet") else {"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 2}
    model = timm.create_model(name, num_classes=5, **small).eval()
    assert has_linear_head(model)
    images = torch.randn(16, 3, 32, 32)
    with torch.no_grad():
        head = model.get_classifier()
        head.weight.normal_()
        head.bias.normal_()
        features = model.forward_head(model.forward_features(images), pre_logits=True)
        found = cosines(model, images)
        expected = features @ head.weight.T / (features.norm(dim=1, keepdim=True) * head.weight.norm(dim=1))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert float(found.abs().max()) <= 1 + 1e-6
        with torch.autocast("cpu", torch.bfloat16):
            half = model.forward_head(model.forward_features(images), pre_logits=True).float()
            said = cosines(model, images)
        exact = torch.nn.functional.normalize(half, dim=1) @ torch.nn.functional.normalize(head.weight, dim=1).T
        torch.testing.assert_close(said, exact, rtol=1e-5, atol=1e-5)
        classify_by_angle_(model)
        assert torch.equal(model(images).argmax(1), found.argmax(1))
        torch.testing.assert_close(cosines(model, images), found)
