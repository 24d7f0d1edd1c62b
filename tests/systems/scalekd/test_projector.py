"""ScaleKD's projector and comparisons against their formulas in float64, every parameter random."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from patchloom.errors import UsageError
from patchloom.systems.scalekd.projector import CrossAttentionProjector, default_heads, mimic_alternative, mimic_spatial


def randomised(module: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for tensor in [*module.parameters(), *module.buffers()]:
        if tensor.is_floating_point():
            tensor.data.copy_(torch.rand_like(tensor) + 0.1 if tensor.ndim == 1 else torch.randn_like(tensor) * 0.3)
    return module.double().eval()


def dct_without_constant(x):
    """The published form: unnormalised 2-D cosine transform, coefficient (0, 0) to zero, and back."""
    n = x.shape[-1]
    grid = torch.arange(n, dtype=torch.float64)
    basis = 2 * torch.cos(math.pi * grid[:, None] * (2 * grid[None] + 1) / (2 * n))
    coefficients = basis @ x @ basis.T
    coefficients[..., 0, 0] = 0
    inverse = torch.linalg.inv(basis)
    return inverse @ coefficients @ inverse.T


@pytest.mark.parametrize("norm", ["batch", "layer"])
@pytest.mark.parametrize("learned", [True, False])
def test_projector_is_the_formula(norm, learned):
    m = randomised(CrossAttentionProjector(6, 8, (3, 4), (2, 2), 2, learned, 5.0, norm))
    x, given = torch.randn(2, 6, 3, 4, dtype=torch.float64), torch.randn(2, 4, 8, dtype=torch.float64)
    conv = nn.functional.conv2d(x, m.student_conv.weight, m.student_conv.bias, padding=1)
    if norm == "batch":
        n = m.student_norm
        mean, var = n.running_mean.view(1, -1, 1, 1), n.running_var.view(1, -1, 1, 1)
        normed = (conv - mean) / (var + n.eps).sqrt() * n.weight.view(1, -1, 1, 1) + n.bias.view(1, -1, 1, 1)
    else:
        n = m.student_norm
        centred = conv - conv.mean(1, keepdim=True)
        unit = centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt()
        normed = unit * n.weight.view(1, -1, 1, 1) + n.bias.view(1, -1, 1, 1)
    tokens = (normed.relu() + m.pos_embed).flatten(2).transpose(1, 2)
    query = m.query.weight.expand(2, -1, -1) if learned else given
    as_map = query.transpose(1, 2).reshape(2, 8, 2, 2)
    asked = nn.functional.conv2d(as_map, m.query_conv.weight, m.query_conv.bias).relu().flatten(2).transpose(1, 2)
    q, k, v = m.q(asked), m.k(tokens), m.v(tokens)
    heads = []
    for part in (slice(0, 4), slice(4, 8)):
        weights = (5.0 * 4**-0.5 * q[..., part] @ k[..., part].transpose(1, 2)).softmax(-1)
        heads.append(weights @ v[..., part])
    z = nn.functional.layer_norm(m.proj(torch.cat(heads, -1)), (8,), m.norm.weight, m.norm.bias, 1e-5)
    expected = z + m.fc2(m.fc1(z).relu())
    torch.testing.assert_close(m(x, None if learned else given), expected)


def test_given_queries_win_over_learned_ones():
    m = randomised(CrossAttentionProjector(6, 8, (3, 3), (2, 2), 2))
    x = torch.randn(1, 6, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(m(x, m.query.weight[None]), m(x))
    assert not torch.allclose(m(x, torch.randn(1, 4, 8, dtype=torch.float64)), m(x))


def test_comparisons_are_the_published_ones():
    torch.manual_seed(1)
    tokens, teacher = torch.randn(3, 25, 7, dtype=torch.float64), torch.randn(3, 7, 5, 5, dtype=torch.float64)
    student = tokens.transpose(1, 2).reshape(3, 7, 5, 5)

    def distance(a, b):
        a, b = a / a.norm(dim=1, keepdim=True), b / b.norm(dim=1, keepdim=True)
        return float((a - b).square().sum() / 3)

    assert float(mimic_spatial(tokens, teacher)) == pytest.approx(0.08 * distance(student, teacher))
    published = distance(dct_without_constant(student), dct_without_constant(teacher))
    assert float(mimic_alternative(tokens, teacher)) == pytest.approx(0.06 * published)
    assert float(mimic_spatial(tokens, teacher, scale="per_token")) == pytest.approx(
        0.08 * distance(student, teacher) * 49 / 25
    )


def test_constant_maps_give_finite_losses_and_gradients():
    tokens = torch.ones(1, 4, 3, requires_grad=True)
    loss = mimic_alternative(tokens, torch.ones(1, 3, 2, 2))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(tokens.grad).all()


def test_the_teacher_gets_no_gradient():
    teacher = torch.randn(1, 3, 2, 2, requires_grad=True)
    tokens = torch.randn(1, 4, 3, requires_grad=True)
    (mimic_spatial(tokens, teacher) + mimic_alternative(tokens, teacher)).backward()
    assert teacher.grad is None
    assert tokens.grad.any()


def test_what_does_not_fit_is_refused():
    with pytest.raises(UsageError, match="teacher_dim 8 is not divisible by num_heads 3"):
        CrossAttentionProjector(6, 8, (3, 3), (2, 2), 3)
    m = CrossAttentionProjector(6, 8, (3, 3), (2, 2), 2, learned_query=False)
    with pytest.raises(UsageError, match="4x4, and the projector was made for 3x3"):
        m(torch.zeros(1, 6, 4, 4))
    with pytest.raises(UsageError, match="no queries of its own"):
        m(torch.zeros(1, 6, 3, 3))
    with pytest.raises(UsageError, match="9 queries were given"):
        m(torch.zeros(1, 6, 3, 3), torch.zeros(1, 9, 8))
    with pytest.raises(UsageError, match="meet a teacher's map of 3x3 with 8 channels"):
        mimic_spatial(torch.zeros(1, 4, 8), torch.zeros(1, 8, 3, 3))


def test_heads_of_about_64_channels_divide_the_width():
    assert [default_heads(width) for width in (32, 192, 384, 768, 1000)] == [1, 3, 6, 12, 10]
