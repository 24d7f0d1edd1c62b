"""Views of an image: what part of it they show, and where in it their tokens look."""

import pytest
import torch

from patchloom.encoders import create_encoder
from patchloom.systems.dvt.views import View, draw_views, view_coords, view_features, view_images


def test_the_whole_image_is_the_last_view_and_crops_are_of_the_share_asked_for():
    views = draw_views(200, (64, 96), (0.1, 0.5), 0.5, torch.Generator().manual_seed(0))
    assert views[-1] == View((0, 0, 64, 96), flipped=False)
    shares = [view.box[2] * view.box[3] / (64 * 96) for view in views[:-1]]
    assert min(shares) > 0.08
    assert max(shares) < 0.52
    assert 60 < sum(view.flipped for view in views) < 140
    assert draw_views(5, (64, 96), (0.1, 0.5), 0.5, torch.Generator().manual_seed(0)) == views[:5] + views[-1:]


def test_tokens_look_from_edge_to_edge_of_their_crop_and_flips_mirror_them():
    view = View((16, 8, 32, 16), flipped=False)
    coords = view_coords(view, (64, 64), (3, 5))
    assert coords.shape == (3, 5, 2)
    torch.testing.assert_close(coords[0, :, 0], torch.linspace(8 / 64, 24 / 64, 5))
    torch.testing.assert_close(coords[:, 0, 1], torch.linspace(16 / 64, 48 / 64, 3))
    mirrored = view_coords(view._replace(flipped=True), (64, 64), (3, 5))
    torch.testing.assert_close(mirrored[..., 0], coords.flip(1)[..., 0])
    torch.testing.assert_close(mirrored[..., 1], coords[..., 1])
    centred = view_coords(view, (64, 64), (2, 2), "centers")
    torch.testing.assert_close(centred[0, :, 0], torch.tensor([12 / 64, 20 / 64]))


def test_views_show_the_part_of_the_image_they_say():
    image = torch.arange(64.0).reshape(1, 8, 8).repeat(3, 1, 1)
    whole, left = view_images(image, [View((0, 0, 8, 8), flipped=True), View((0, 0, 8, 4), flipped=False)])
    assert torch.equal(whole, image.flip(-1))
    assert left.shape == (3, 8, 8)
    assert float(left[0, 4].max()) < 36.5  # columns 0 to 3 of row 4


@pytest.mark.parametrize("batch_size", [1, 3])
def test_features_do_not_hang_on_the_batch(batch_size):
    encoder = create_encoder("vit_tiny_patch16_224", embed_dim=64, depth=1, num_heads=2, image_size=32, patch_size=8)
    image = torch.randn(3, 32, 32)
    views = draw_views(3, (32, 32), (0.1, 0.5), 0.5, torch.Generator())
    found = view_features(encoder.eval(), image, views, None, batch_size)
    assert found.shape == (4, 4, 4, 64)
    torch.testing.assert_close(found, view_features(encoder, image, views), atol=1e-5, rtol=1e-5)
