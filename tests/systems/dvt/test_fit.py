"""The fit of the first stage: schedule, phases, images side by side, recovery of a known mixture."""

import math

import pytest
import torch
import torch.nn.functional as F

from patchloom.systems.dvt import fit as module
from patchloom.systems.dvt.fit import FitSettings, fit, fit_in_threads, rate
from patchloom.systems.dvt.model import SingleImageDenoiser
from patchloom.systems.dvt.views import draw_views, view_coords

FIELD = {"n_levels": 2, "base_resolution": 4, "max_resolution": 8}


def problem(images=1, views=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(images, views, 12, 8, generator=generator)
    return features, torch.rand(images, views, 12, 2, generator=generator)


def models(count):
    made = []
    for seed in range(count):
        torch.manual_seed(seed)
        made.append(SingleImageDenoiser(8, (3, 4), **FIELD))
    return made


def test_the_rate_rises_over_a_tenth_of_the_steps_and_falls_along_half_a_cosine():
    assert [rate(step, 25_000) for step in (0, 1250, 2500)] == pytest.approx([0, 0.005, 0.01])
    assert rate(25_000, 25_000) == pytest.approx(0.001)
    assert rate(10_000, 25_000) == pytest.approx(0.001 + 0.0045 * (1 + math.cos(math.pi * 7500 / 22500)))


def test_artefacts_stay_where_they_are_in_the_residual_phase(monkeypatch):
    (model,) = models(1)
    features, coords = problem()
    seen = []
    start = SingleImageDenoiser.start_residual

    def noted(self):
        start(self)
        seen.append((self.shared_artifacts.detach().clone(), self.residual_predictor[4].weight.detach().clone()))

    monkeypatch.setattr(SingleImageDenoiser, "start_residual", noted)
    fit(model, features, coords, [torch.Generator().manual_seed(0)], FitSettings(20, 16))
    ((artifacts, residual),) = seen
    assert torch.equal(model.shared_artifacts, artifacts)
    assert not torch.equal(model.residual_predictor[4].weight, residual)


def test_the_optimiser_is_adam_with_the_published_constants(monkeypatch):
    made = []
    adam = torch.optim.Adam
    monkeypatch.setattr(module.torch.optim, "Adam", lambda *a, **k: made.append(adam(*a, **k)) or made[-1])
    features, coords = problem()
    fit(models(1)[0], features, coords, [torch.Generator()], FitSettings(2, 4))
    (group,) = made[0].param_groups
    assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.9, 0.99), 1e-15, 1e-5 / 1024)
    assert len(made) == 1


def test_an_image_is_fitted_as_if_it_were_alone():
    features, coords = problem(images=3)
    alone = models(3)
    stacked = SingleImageDenoiser.stack(alone)
    settings = FitSettings(8, 16)
    fit(stacked, features, coords, [torch.Generator().manual_seed(i) for i in range(3)], settings)
    for i, model in enumerate(alone):
        fit(model, features[i : i + 1], coords[i : i + 1], [torch.Generator().manual_seed(i)], settings)
        for name, value in model.state_dict().items():
            torch.testing.assert_close(stacked.state_dict()[name][i : i + 1], value, atol=2e-4, rtol=1e-3)


def test_on_cores_of_their_own_images_come_out_to_the_bit():
    features, coords = problem(images=3)
    apart, alone, settings = models(3), models(3), FitSettings(6, 16)
    threads = torch.get_num_threads()
    losses = fit_in_threads(apart, features, coords, [torch.Generator().manual_seed(i) for i in range(3)], settings)
    assert torch.get_num_threads() == threads
    for i, model in enumerate(alone):
        own = slice(i, i + 1)
        (loss,) = fit(model, features[own], coords[own], [torch.Generator().manual_seed(i)], settings)["loss"]
        assert losses["loss"][i] == loss
        assert all(torch.equal(apart[i].state_dict()[name], value) for name, value in model.state_dict().items())


def test_images_on_cores_of_their_own_stop_when_they_are_told_to():
    features, coords = problem(images=2)

    def interrupted(step):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit_in_threads(models(2), features, coords, [torch.Generator()] * 2, FitSettings(10**6, 16), interrupted)


def mixture(width=32, rank=8, grid=8, views=64, seed=0):
    """Features of views of a smooth random image, with a pattern of the position and noise added to them."""
    generator = torch.Generator().manual_seed(seed)
    control = torch.randn(1, rank, 6, 6, generator=generator)
    mix = torch.randn(width, rank, generator=generator) / rank**0.5
    pattern = 0.9 * torch.randn(grid * grid, width, generator=generator)

    def content(coords):
        read = F.grid_sample(control, 2 * coords[None, None] - 1, mode="bicubic", align_corners=True)
        return read[0, :, 0].T @ mix.T

    crops = draw_views(views, (64, 64), (0.1, 0.5), 0.5, generator)
    coords = torch.stack([view_coords(view, (64, 64), (grid, grid)).reshape(-1, 2) for view in crops])
    clean = torch.stack([content(each) for each in coords])
    clean = clean / clean.std()
    noise = 0.05 * torch.randn(clean.shape, generator=generator)
    return clean + pattern + noise, coords, clean[-1]


def centred_cosine(a, b):
    return float(F.cosine_similarity(a - a.mean(0), b - b.mean(0), dim=-1).mean())


@pytest.mark.slow
def test_a_known_mixture_is_taken_apart():
    features, coords, clean = mixture()
    torch.manual_seed(0)
    model = SingleImageDenoiser(32, (8, 8), hidden_dim=128, n_levels=4, base_resolution=4, max_resolution=32)
    fit(model, features[None], coords[None], [torch.Generator().manual_seed(0)], FitSettings(1000, 1024))
    found = model.decompose(features[-1].reshape(8, 8, 32), coords[-1].reshape(8, 8, 2))
    assert centred_cosine(features[-1], clean) < 0.8
    assert centred_cosine(found["denoised"].reshape(64, 32), clean) > 0.97
