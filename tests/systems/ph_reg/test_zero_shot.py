"""Segmentation by names: windows, several names of a class, background, refinement."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from patchloom.encoders import create_encoder, normalize
from patchloom.errors import UsageError
from patchloom.systems.ph_reg.clip import DenseCLIP
from patchloom.systems.ph_reg.zero_shot import ClassTexts, class_texts, label_map, pamr, zero_shot_segment

CONFIG = {
    "embed_dim": 12,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 16, "patch_size": 8, "head_width": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


def tower() -> Any:
    torch.manual_seed(0)
    size = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8}
    encoder = create_encoder("vit_base_patch16_clip_quickgelu_224", image_size=32, **size)
    return DenseCLIP(encoder.eval(), torch.randn(32, 6)).eval()


TEXTS = ClassTexts(
    F.normalize(torch.randn(4, 6, generator=torch.Generator().manual_seed(1)), dim=-1), torch.tensor([0, 1, 1, 2])
)


def test_one_window_is_the_cosine_of_patches_and_names():
    model, images = tower(), torch.rand(2, 3, 32, 32)
    found = zero_shot_segment(model, images, TEXTS, window=32, stride=16)
    with torch.no_grad():
        patches = F.normalize(model(normalize(images, model.encoder)), dim=-1) @ TEXTS.features.T
    maps = patches.transpose(1, 2).unflatten(2, (4, 4))
    likely = (40 * F.interpolate(maps, (32, 32), mode="bilinear", align_corners=False)).softmax(1)
    assert torch.allclose(found[:, 0], likely[:, 0], atol=1e-5)
    assert torch.allclose(found[:, 1], likely[:, 1:3].amax(1), atol=1e-5)  # the likelier of two names
    assert torch.allclose(found[:, 2], likely[:, 3], atol=1e-5)


@pytest.mark.parametrize("size", [(32, 72), (20, 45), (70, 33)])
def test_images_of_any_size_come_back_at_it(size):
    found = zero_shot_segment(tower(), torch.rand(1, 3, *size), TEXTS, window=32, stride=16, short_side=40, refine=2)
    assert found.shape == (1, 3, *size)
    assert bool((found >= 0).all())
    assert bool((found <= 1).all())


def test_what_is_unlikely_is_background():
    probabilities = torch.tensor([0.05, 0.06, 0.9, 0.1, 0.04, 0.02]).view(1, 2, 1, 3)
    assert label_map(probabilities).tolist() == [[[1, 0, 0]]]
    assert label_map(probabilities, 0.1, background=7).tolist() == [[[1, 7, 0]]]


def test_refinement_is_that_of_a_loop():
    generator = torch.Generator().manual_seed(2)
    image = torch.rand(1, 2, 6, 5, generator=generator, dtype=torch.float64)
    maps = torch.rand(1, 3, 6, 5, generator=generator, dtype=torch.float64)
    expected = torch.zeros_like(maps)
    for y in range(6):
        for x in range(5):
            places = [
                (min(max(y + d * a, 0), 5), min(max(x + d * b, 0), 4))
                for d in (1, 2)
                for a in (-1, 0, 1)
                for b in (-1, 0, 1)
            ]
            around = [place for n, place in enumerate(places) if n % 9 != 4]
            spread = torch.stack([image[0, :, a, b] for a, b in places]).std(0)
            nearness = [
                -((image[0, :, y, x] - image[0, :, a, b]).abs() / (1e-8 + 0.1 * spread)).mean() for a, b in around
            ]
            weights = torch.stack(nearness).softmax(0)
            expected[0, :, y, x] = sum(w * maps[0, :, a, b] for w, (a, b) in zip(weights, around, strict=True))
    assert torch.allclose(pamr(image, maps, 1, (1, 2)), expected, atol=1e-12)
    assert torch.equal(pamr(image, maps, 0), maps)


def test_windows_that_patches_do_not_fill_are_refused():
    with pytest.raises(UsageError, match="window is 30; it must be a multiple of the patch size 8"):
        zero_shot_segment(tower(), torch.rand(1, 3, 32, 32), TEXTS, window=30)


def test_names_become_texts_by_the_towers_own(tmp_path):
    open_clip = pytest.importorskip("open_clip")
    (tmp_path / "Tiny-Names.json").write_text(json.dumps(CONFIG))
    open_clip.add_model_config(tmp_path / "Tiny-Names.json")
    torch.manual_seed(0)
    model = open_clip.create_model("Tiny-Names", pretrained=None).eval()
    torch.save(model.state_dict(), tmp_path / "w.pt")
    found = class_texts(["road, street", "sky"], f"open_clip:Tiny-Names/{tmp_path / 'w.pt'}", ["a photo of a {}."])
    assert found.owners.tolist() == [0, 0, 1]
    tokens = open_clip.get_tokenizer("Tiny-Names")(["a photo of a street."])
    with torch.no_grad():
        expected = F.normalize(model.encode_text(tokens), dim=-1)[0]
    assert torch.allclose(found.features[1], expected, atol=1e-6)
    with pytest.raises(UsageError, match="every class needs a name"):
        class_texts(["road", " , "], "open_clip:Tiny-Names/x")
