"""The model of one image: losses and what they train, against formulas in float64."""

import numpy as np
import pytest
import torch

from patchloom.errors import UsageError
from patchloom.systems.dvt.model import SingleImageDenoiser

FIELD = {"n_levels": 2, "base_resolution": 4, "max_resolution": 8}


def randomised(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return module


def tokens(n=10, width=8, seed=2, images=()):
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randn(*images, n, width, dtype=torch.float64, generator=generator)
    coords = torch.rand(*images, n, 2, dtype=torch.float64, generator=generator)
    return raw, coords, torch.randint(12, (*images, n), generator=generator)


def parts(model, raw, coords, places):
    """F(u), G[p] and h(raw) as arrays."""
    field = model.neural_field(coords).detach().numpy()
    artifacts = model.shared_artifacts[0].flatten(1).T.detach().numpy()[places.numpy()]
    x = raw.numpy()
    for layer in (0, 2, 4):
        linear = model.residual_predictor[layer]
        x = x @ linear.weight[0].detach().numpy().T + linear.bias[0].detach().numpy()
        x = np.maximum(x, 0) if layer < 4 else x
    return field, artifacts, x


def value(loss):
    return float(loss.detach())


def cosine(a, b):
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


def test_in_the_first_phase_field_and_artefact_explain_the_features():
    model = randomised(SingleImageDenoiser(8, (3, 4), **FIELD)).double()
    raw, coords, places = tokens()
    field, artifact, _ = parts(model, raw, coords, places)
    losses = model(raw, coords, places)
    assert value(losses["l2"]) == pytest.approx(((field + artifact - raw.numpy()) ** 2).mean())
    assert value(losses["cosine"]) == pytest.approx(1 - cosine(field + artifact, raw.numpy()).mean())
    losses["loss"].backward()
    assert model.shared_artifacts.grad is not None
    assert all(parameter.grad is None for parameter in model.residual_predictor.parameters())


def test_in_the_residual_phase_each_part_learns_from_its_own_terms():
    model = randomised(SingleImageDenoiser(8, (3, 4), **FIELD)).double()
    raw, coords, places = tokens()
    field, artifact, residual = parts(model, raw, coords, places)
    model.start_residual()
    losses = model(raw, coords, places)
    predicted, left = field + artifact + residual, raw.numpy() - field - artifact
    expected = {
        "l2": ((predicted - raw.numpy()) ** 2).mean(),
        "cosine": 1 - cosine(predicted, raw.numpy()).mean(),
        "residual": ((residual - left) ** 2).mean(),
        "sparsity": np.abs(residual).mean(),
    }
    expected["loss"] = expected["l2"] + expected["cosine"] + 0.1 * expected["residual"] + 0.02 * expected["sparsity"]
    assert {name: value(loss) for name, loss in losses.items()} == pytest.approx(expected)
    losses["loss"].backward()
    assert model.shared_artifacts.grad is None
    # h: the gradient of its two terms alone; F: that of the reconstruction, h being a constant.
    last = model.residual_predictor[4].bias
    slope = 0.1 * 2 * (residual - left) / residual.size + 0.02 * np.sign(residual) / residual.size
    np.testing.assert_allclose(last.grad[0].numpy(), slope.sum(0), rtol=1e-9, atol=1e-12)
    a, b = predicted, raw.numpy()
    na, nb = (np.linalg.norm(x, axis=-1, keepdims=True) for x in (a, b))
    of_cosine = b / (na * nb) - (a * b).sum(-1, keepdims=True) * a / (na**3 * nb)
    slope = 2 * (a - b) / a.size - of_cosine / len(a)
    np.testing.assert_allclose(model.neural_field.mlp[2].bias.grad[0].numpy(), slope.sum(0), rtol=1e-7, atol=1e-12)


def test_artefacts_are_read_at_tokens_by_number_or_by_their_place_in_the_view():
    model = randomised(SingleImageDenoiser(8, (3, 4), **FIELD))
    y, x = torch.meshgrid(torch.linspace(-1, 1, 3), torch.linspace(-1, 1, 4), indexing="ij")
    by_place = model.artifacts(torch.stack([x, y], -1).reshape(1, 12, 2))
    torch.testing.assert_close(by_place, model.artifacts(torch.arange(12)[None]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(by_place[0], model.shared_artifacts[0].flatten(1).T, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("in_residual_phase", [False, True])
def test_images_side_by_side_have_the_losses_and_gradients_of_each(in_residual_phase):
    singles = [randomised(SingleImageDenoiser(8, (3, 4), **FIELD), seed).double() for seed in (1, 2, 3)]
    stacked = SingleImageDenoiser.stack(singles)
    raw, coords, places = tokens(images=(3,))
    if in_residual_phase:
        for model in (stacked, *singles):
            model.start_residual()
    total = stacked(raw, coords, places)
    total["loss"].backward()
    alone = [model(raw[i], coords[i], places[i]) for i, model in enumerate(singles)]
    for name, loss in total.items():
        assert value(loss) == pytest.approx(sum(value(losses[name]) for losses in alone))
    for losses in alone:
        losses["loss"].backward()
    for name, parameter in stacked.named_parameters():
        for i, model in enumerate(singles):
            own = dict(model.named_parameters())[name]
            assert (own.grad is None) == (parameter.grad is None)
            if own.grad is not None:
                torch.testing.assert_close(parameter.grad[i : i + 1], own.grad)
    again = stacked.member(1).state_dict()
    assert all(torch.equal(again[name], own) for name, own in singles[1].state_dict().items())


def test_features_of_a_view_are_taken_apart():
    model = randomised(SingleImageDenoiser(8, (3, 4), **FIELD)).double()
    raw = torch.randn(3, 4, 8, dtype=torch.float64)
    coords = torch.rand(3, 4, 2, dtype=torch.float64)
    found = model.decompose(raw, coords)
    field, artifact, residual = parts(model, raw.reshape(12, 8), coords.reshape(12, 2), torch.arange(12))
    for name, expected in {
        "denoised": field,
        "artifact": artifact,
        "residual": residual,
        "subtracted": raw.reshape(12, 8).numpy() - artifact - residual,
    }.items():
        np.testing.assert_allclose(found[name].reshape(12, 8).numpy(), expected, rtol=1e-9, atol=1e-9)


def test_parts_can_be_left_out():
    model = SingleImageDenoiser(8, (3, 4), residual=False, shared_artifacts=False, **FIELD)
    raw, coords, places = (each.float() if each.is_floating_point() else each for each in tokens())
    model.start_residual()
    assert set(model(raw, coords, places)) == {"loss", "l2", "cosine"}
    assert float(model.decompose(torch.randn(3, 4, 8), torch.rand(3, 4, 2))["artifact"].abs().sum()) == 0


def test_another_grid_and_coordinates_outside_are_refused():
    model = SingleImageDenoiser(8, (3, 4), **FIELD)
    with pytest.raises(UsageError, match=r"\(4, 3, 8\).*grid of \(3, 4\)"):
        model.decompose(torch.randn(4, 3, 8), torch.rand(4, 3, 2))
    with pytest.raises(UsageError, match="outside of the image"):
        model(torch.randn(2, 8), torch.tensor([[0.1, 0.2], [0.3, -0.1]]), torch.tensor([0, 1]))
