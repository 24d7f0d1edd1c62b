"""The pipeline of EAR: one map and score from one image, always the same."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import uniform_filter

from patchloom.errors import UsageError
from patchloom.systems.ear.losses import msgms_map
from patchloom.systems.ear.model import EAR, RecoveryUNet, calibrate_threshold, image_scores, recovery_map


def pipeline(**settings):
    torch.manual_seed(0)
    return EAR(None, RecoveryUNet(widths=(4, 6, 8)), **{"mosaic_cell": 4, "smoothing": 5, **settings}).eval()


def images_of(*shape, seed=1):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_pipeline_is_its_parts():
    model, images = pipeline(), images_of(2, 3, 32, 24)
    found = model(images)
    assert torch.equal(found["recovered"], model.unet(found["input"]))
    kept = found["mask"].expand_as(images) == 0
    assert torch.equal(found["input"][kept], images[kept])
    assert float(found["mask"].mean()) == pytest.approx(0.15, abs=0.05)
    assert torch.equal(found["anomaly_map"], recovery_map(images, found["recovered"], 5))
    assert torch.equal(found["pred_score"], found["anomaly_map"].amax((1, 2, 3)))


def test_the_map_is_smoothed_by_a_mean_with_reflected_border():
    x, y = images_of(2, 3, 24, 31).double(), images_of(2, 3, 24, 31, seed=2).double()
    raw = (1 - msgms_map(x, y)).mean(1).numpy()
    expected = np.array([uniform_filter(one, 7, mode="mirror") for one in raw])
    torch.testing.assert_close(recovery_map(x, y, 7)[:, 0], torch.tensor(expected), atol=1e-10, rtol=1e-10)
    np.testing.assert_allclose(recovery_map(x, y, 1)[:, 0].numpy(), raw)
    with pytest.raises(UsageError, match="too small for smoothing=51"):
        recovery_map(x, y, 51)


def test_the_three_scores():
    x, y = images_of(2, 3, 24, 31), images_of(2, 3, 24, 31, seed=2)
    found = recovery_map(x, y, 5)
    np.testing.assert_allclose(
        image_scores(x, y, found, "l2").numpy(), ((x - y) ** 2).mean((1, 2, 3)).numpy(), rtol=1e-6
    )
    np.testing.assert_allclose(image_scores(x, y, found, "mean").numpy(), found.mean((1, 2, 3)).numpy())
    assert image_scores(x, y, found).tolist() == found.flatten(1).max(1).values.tolist()


def test_the_same_image_has_the_same_score_whatever_came_before():
    model, images = pipeline(), images_of(3, 3, 32, 32)
    first = [model(image[None])["pred_score"] for image in images]
    torch.rand(7)
    again = [model(image[None])["pred_score"] for image in images.flip(0)][::-1]
    assert torch.equal(torch.cat(first), torch.cat(again))


def test_without_excision_the_network_sees_the_image():
    images = images_of(1, 3, 32, 32)
    found = pipeline(excises=False)(images)
    assert not found["mask"].any()
    assert torch.equal(found["input"], images)


def test_good_images_alone_give_their_995th_permille():
    scores = torch.linspace(0, 1, 1001, dtype=torch.float64)
    assert calibrate_threshold(scores) == pytest.approx(0.995)


def test_with_defects_the_threshold_has_the_best_f1():
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 2, 60)
    scores = labels + generator.normal(0, 0.6, 60)

    def f1(limit):
        told = scores >= limit
        return 2 * (told & (labels == 1)).sum() / (told.sum() + labels.sum())

    found = calibrate_threshold(torch.tensor(scores), labels.tolist())
    assert f1(found) == pytest.approx(max(f1(limit) for limit in scores))
    with pytest.raises(UsageError, match="all there are have a defect"):
        calibrate_threshold(torch.tensor(scores), [1] * 60)
    with pytest.raises(UsageError, match="there is none"):
        calibrate_threshold(torch.tensor([]))


def test_normalised_scores_are_half_at_the_threshold():
    model = pipeline()
    model.calibrate([1.0, 2.0, 5.0], [1.0, 2.0, 5.0], [0, 0, 1])
    assert float(model.threshold) == 5
    assert model.normalized(torch.tensor([5.0, 1.0, 0.0, 99.0])).tolist() == [0.5, 0.0, 0.0, 1.0]
    assert all(name in model.state_dict() for name in ("threshold", "pixel_threshold", "score_min", "score_max"))


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"score": "sum"}, "score"), ({"smoothing": 4}, "smoothing is 4"), ({"quantile": 1.2}, r"quantile is 1\.2")],
)
def test_impossible_settings_are_refused(settings, words):
    with pytest.raises(UsageError, match=words):
        pipeline(**settings)


def test_an_image_smaller_than_the_levels_is_refused():
    with pytest.raises(UsageError, match="too small for 3 levels"):
        RecoveryUNet(widths=(4, 6, 8))(torch.rand(1, 3, 3, 20))


def test_skips_pass_their_filters():
    torch.manual_seed(0)
    network = RecoveryUNet(widths=(4, 6, 8)).eval()
    images = images_of(1, 3, 16, 16)
    before = network(images)

    class Nothing(torch.nn.Module):
        def forward(self, x):
            return 0 * x

    network.skip_filter[0] = Nothing()
    assert not torch.equal(before, network(images))
