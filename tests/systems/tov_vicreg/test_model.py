"""VICReg's terms and the order head against their formulas, written out in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from patchloom.encoders import create_encoder
from patchloom.errors import UsageError
from patchloom.systems.tov_vicreg.model import (
    PERMUTATIONS,
    TemporalOrderHead,
    TOVVICReg,
    draw_orders,
    initialize_as_dino,
    make_projector,
    vicreg_terms,
)


def written_out(x, y, eps=1e-4, gamma=1.0):
    """The three terms, element by element."""
    n, d = x.shape
    invariance = sum((x[i, j] - y[i, j]) ** 2 for i in range(n) for j in range(d)) / (n * d)
    variance = covariance = torch.zeros((), dtype=torch.float64)
    for z in (x, y):
        means = [sum(z[i, j] for i in range(n)) / n for j in range(d)]
        table = [
            [sum((z[i, a] - means[a]) * (z[i, b] - means[b]) for i in range(n)) / (n - 1) for b in range(d)]
            for a in range(d)
        ]
        hinges = [torch.clamp(gamma - torch.sqrt(table[j][j] + eps), min=0) for j in range(d)]
        variance = variance + sum(hinges) / d / 2
        covariance = covariance + sum(table[a][b] ** 2 for a in range(d) for b in range(d) if a != b) / d
    return invariance, variance, covariance


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return module


def tiny(**settings) -> TOVVICReg:
    encoder = create_encoder("vit_tiny_patch8_84", image_size=16, embed_dim=24, depth=2, num_heads=2)
    model = TOVVICReg(encoder, projector="20-12-8", **settings).double()
    return randomised(model)


@pytest.mark.parametrize("spread", [0.3, 3.0])
def test_terms_are_the_formulas(spread):
    x, y = (spread * torch.randn(5, 4, dtype=torch.float64) + 0.7 for _ in range(2))
    terms = vicreg_terms(x, y)
    for value, expected in zip(terms.values(), written_out(x, y), strict=True):
        torch.testing.assert_close(value, expected)
    assert list(terms) == ["invariance", "variance", "covariance"]
    other = vicreg_terms(x, y, eps=0.5, gamma=2.0)["variance"]
    torch.testing.assert_close(other, written_out(x, y, 0.5, 2.0)[1])


def test_only_the_invariance_sees_a_shift():
    x = torch.randn(6, 3, dtype=torch.float64)
    still, moved = vicreg_terms(x, x), vicreg_terms(x, x + 2)
    assert still["invariance"] == 0
    assert moved["invariance"] == pytest.approx(4)
    torch.testing.assert_close(still["variance"], moved["variance"])
    torch.testing.assert_close(still["covariance"], moved["covariance"])


def test_half_precision_is_computed_in_float32():
    x = 60 * torch.randn(512, 64)
    terms = vicreg_terms(x.half(), x.half())
    assert all(value.dtype == torch.float32 and torch.isfinite(value) for value in terms.values())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = vicreg_terms(x, x)
    torch.testing.assert_close(inside["covariance"], vicreg_terms(x, x)["covariance"])


def test_the_order_head_permutes_as_listed():
    assert PERMUTATIONS == ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))
    head = randomised(TemporalOrderHead(4).double())
    items = [torch.randn(6, 4, dtype=torch.float64) for _ in range(3)]
    logits, targets = head(items, torch.arange(6))
    for row, order in enumerate(PERMUTATIONS):
        joined = torch.cat([items[place][row] for place in order])
        expected = joined @ head.linear.weight[0] + head.linear.bias[0]
        torch.testing.assert_close(logits[row, 0], expected)
    assert targets.flatten().tolist() == [0, 1, 1, 1, 1, 1]
    assert list(head.state_dict()) == ["linear.weight", "linear.bias"]


def test_draws_are_uniform_or_balanced_and_repeat():
    counts = draw_orders(6000, generator=torch.Generator().manual_seed(0)).bincount(minlength=6)
    assert counts.min() > 850
    assert counts.max() < 1150
    balanced = draw_orders(6000, balanced=True, generator=torch.Generator().manual_seed(0)).bincount(minlength=6)
    assert 2800 < balanced[0] < 3200
    assert balanced[1:].min() > 500
    draws = [draw_orders(20, generator=torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*draws)


@pytest.mark.parametrize("chronological", [False, True])
def test_the_whole_loss_is_written_out(chronological):
    model = tiny(sim=3.0, std=5.0, cov=7.0, temporal=0.6, chronological=chronological).train()
    views = torch.rand(4, 6, 3, 16, 16, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 3, 4, 5])
    losses = model(*views, labels)
    h = [model.encoder(view) for view in views]
    projected = []
    for part in h[:2]:
        z = part
        for layer in (0, 3):
            linear, norm = model.projector[layer], model.projector[layer + 1]
            z = z @ linear.weight.T + linear.bias
            z = (z - z.mean(0)) / torch.sqrt(z.var(0, correction=0) + 1e-5) * norm.weight + norm.bias
            z = z.clamp(min=0)
        projected.append(z @ model.projector[6].weight.T)
    terms = written_out(*projected)
    place = [h[2], h[0], h[3]] if chronological else [h[0], h[2], h[3]]
    logs = []
    for row, order in enumerate(itertools.permutations(range(3))):
        logit = torch.cat([place[i][row] for i in order]) @ model.order_head.linear.weight[0]
        logit = logit + model.order_head.linear.bias[0]
        target = 0.0 if row == 0 else 1.0
        share = torch.sigmoid(logit)
        logs.append(-(target * share.log() + (1 - target) * (1 - share).log()))
    order_loss = sum(logs) / 6
    for name, expected in zip(("invariance", "variance", "covariance"), terms, strict=True):
        torch.testing.assert_close(losses[name], expected)
    torch.testing.assert_close(losses["temporal"], order_loss)
    torch.testing.assert_close(losses["loss"], 3 * terms[0] + 5 * terms[1] + 7 * terms[2] + 0.6 * order_loss)


def test_running_statistics_are_those_of_four_calls_in_order():
    model = tiny().train()
    views = torch.rand(4, 6, 3, 16, 16, dtype=torch.float64)
    h = [model.encoder(view) for view in views]
    mean = torch.zeros(20, dtype=torch.float64)
    for part in h:
        z = part @ model.projector[0].weight.T + model.projector[0].bias
        mean = 0.9 * mean + 0.1 * z.mean(0)
    model(*views)
    torch.testing.assert_close(model.projector[1].running_mean, mean)
    assert model.projector[4].num_batches_tracked == 4


def test_gradients_reach_the_encoder_through_all_three_observations():
    model = tiny(sim=0, std=0, cov=0, temporal=1.0)
    views = [torch.rand(4, 3, 16, 16, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    model(*views)["loss"].backward()
    touched = [float(view.grad.abs().sum()) > 0 for view in views]
    assert touched == [True, False, True, True]


def test_the_projector_of_the_paper():
    projector = make_projector(192, "1024-1024-1024")
    kinds = [type(layer).__name__ for layer in projector]
    assert kinds == ["Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d", "ReLU", "Linear"]
    assert (projector[0].in_features, projector[6].out_features, projector[6].bias) == (192, 1024, None)
    assert projector[0].bias is not None
    for wrong in ("1024-x", "", "1024-0"):
        with pytest.raises(UsageError, match="widths joined by dashes"):
            make_projector(8, wrong)


def test_a_single_observation_is_refused():
    with pytest.raises(UsageError, match="batch_size of at least 2"):
        tiny()(*torch.rand(4, 1, 3, 16, 16, dtype=torch.float64))


def test_initialisation_is_the_published_one():
    encoder = create_encoder("vit_tiny_patch8_84", depth=2)
    initialize_as_dino(encoder)
    assert encoder.blocks[0].attn.qkv.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert encoder.pos_embed.std().item() == pytest.approx(0.02, rel=0.05)
    assert encoder.blocks[1].mlp.fc1.bias.abs().max() == 0
    assert encoder.patch_embed.proj.weight.abs().max() <= (3 * 64) ** -0.5  # the convolution's own
