"""Segmentation by the names of classes: a dense CLIP tower's patches against sentences, in sliding windows.

The protocol of PH-Reg (Chen et al. 2025, arXiv 2505.21501) and NACLIP (Hajimiri et al. 2025, arXiv 2404.08181): cosines
of patches and texts, enlarged bilinearly, averaged over windows, optionally refined by the image (PAMR, Araslanov and
Roth 2020, arXiv 2005.08104), softmax at 40; of a class of several names the likeliest counts.

>>> texts = ClassTexts(torch.eye(3, 24), torch.tensor([0, 1, 1]))  # the second class has two names
>>> from patchloom.encoders import create_encoder
>>> tower = create_encoder("vit_base_patch16_clip_quickgelu_224", image_size=64, embed_dim=64, depth=2, num_heads=2)
>>> from patchloom.systems.ph_reg.clip import DenseCLIP
>>> model = DenseCLIP(tower, torch.randn(64, 24))
>>> zero_shot_segment(model, torch.rand(1, 3, 80, 100), texts, window=64, stride=32).shape
torch.Size([1, 2, 80, 100])
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from patchloom.encoders import normalize, patch_size
from patchloom.errors import MissingExtraError, UsageError
from patchloom.segment.inference import SlidingWindowSegmenter
from patchloom.systems.ph_reg.clip import DenseCLIP
from patchloom.systems.ph_reg.towers import PREFIX

SCALE = 40.0
NEIGHBOURS = [(down, across) for down in (-1, 0, 1) for across in (-1, 0, 1) if (down, across) != (0, 0)]


class ClassTexts(NamedTuple):
    """What classes are called, in the space of texts."""

    features: Tensor
    """(M, E), normalised; one for each name."""
    owners: Tensor
    """(M,) int64, the class of each name, from 0 on."""


@torch.no_grad()
def class_texts(classes: Sequence[str], tower: str, templates: Sequence[str] | None = None) -> ClassTexts:
    """Return the names of classes in the space of a CLIP's texts.

    Args:
        classes: One text for each class; several names of one class are separated by commas.
        tower: open_clip:MODEL/WEIGHTS, whose weights are a tag of open_clip's or a file of a whole CLIP.
        templates: Sentences with {} for the name; default: the 80 of OpenAI for ImageNet.

    Raises:
        UsageError: No class, or a class without a name.
        MissingExtraError: open_clip is not installed.
    """
    names = [[name.strip() for name in text.split(",") if name.strip()] for text in classes]
    if not names or not all(names):
        raise UsageError("every class needs a name; several of one class are separated by commas")
    try:
        import open_clip
    except ImportError as error:
        raise MissingExtraError("open_clip_torch", "clip", "segmenting by names") from error
    model_name, _, weights = tower.removeprefix(PREFIX).partition("/")
    model: Any = open_clip.create_model(model_name, pretrained=weights).eval()
    tokenizer = open_clip.get_tokenizer(model_name)
    sentences = templates or [template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]
    features, owners = [], []
    for owner, of_class in enumerate(names):
        for name in of_class:
            tokens = tokenizer([sentence.format(name) for sentence in sentences])
            one = F.normalize(model.encode_text(tokens).float(), dim=-1).mean(0)
            features.append(F.normalize(one, dim=-1))
            owners.append(owner)
    return ClassTexts(torch.stack(features), torch.tensor(owners))


@torch.no_grad()
def zero_shot_segment(
    model: DenseCLIP,
    images: Tensor,
    texts: ClassTexts,
    *,
    short_side: int | None = None,
    longest: int = 2048,
    window: int = 224,
    stride: int = 112,
    scale: float = SCALE,
    refine: int = 0,
) -> Tensor:
    """Return how likely each class is at each pixel.

    Args:
        model: The tower.
        images: (B, 3, H, W) in [0, 1].
        texts: The classes, see `class_texts`.
        short_side: The shorter side is first resized to this; published: 448. Default: as it is, made up to patches.
        longest: The longer side is at most this after it.
        window: Side of a window in pixels, a multiple of the patch size; published: 224, and 336 for VOC21.
        stride: Step between windows; published: 112.
        scale: Factor on cosines before the softmax; published: 40.
        refine: Steps of PAMR; published: 10, or none.

    Returns:
        (B, K, H, W), probabilities of K classes; `label_map` makes labels of them.

    Raises:
        UsageError: A window that patches do not fill.
    """
    patch = patch_size(model.encoder)
    if window % patch:
        raise UsageError(f"window is {window}; it must be a multiple of the patch size {patch}")
    height, width = images.shape[-2:]
    factor = 1.0 if short_side is None else short_side / min(height, width)
    factor = min(factor, longest / max(height, width))
    size = [max(patch, round(side * factor / patch) * patch) for side in (height, width)]
    resized = images
    if size != [height, width]:
        resized = F.interpolate(images, size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    inputs = normalize(resized, model.encoder)
    names = texts.features.to(inputs)

    def similarities(crops: Tensor) -> Tensor:
        found = F.normalize(model(crops).float(), dim=-1) @ names.T
        return found.transpose(1, 2).unflatten(2, (crops.shape[2] // patch, crops.shape[3] // patch))

    cosines = SlidingWindowSegmenter(similarities, window, stride)(inputs)
    if refine:
        cosines = pamr(inputs, cosines, refine)
    cosines = F.interpolate(cosines, (height, width), mode="bilinear", align_corners=False)
    likely = (scale * cosines).softmax(1)
    owners = texts.owners.to(likely.device)
    found = likely.new_zeros(len(images), int(owners.max()) + 1, height, width)
    index = owners.view(1, -1, 1, 1).expand(len(images), -1, height, width)
    return found.scatter_reduce(1, index, likely, "amax", include_self=False)


def label_map(probabilities: Tensor, threshold: float = 0.0, background: int = 0) -> Tensor:
    """Return the likeliest class (B, H, W) of probabilities (B, K, H, W).

    Args:
        probabilities: Of K classes.
        threshold: Pixels whose likeliest class is less likely than this are background; published for VOC21: 0.1.
        background: Number of that class.
    """
    most, labels = probabilities.max(1)
    return labels.masked_fill(most < threshold, background)


def pamr(images: Tensor, maps: Tensor, steps: int = 10, dilations: Sequence[int] = (8, 16)) -> Tensor:
    """Return maps that follow the edges of their images: pixel-adaptive refinement (arXiv 2005.08104, section 3.2).

    Every step replaces a value by the mean over its neighbours, weighted by how near their colours are.

    Args:
        images: (B, C, H, W).
        maps: (B, K, H, W).
        steps: How often.
        dilations: Distances of the 8 neighbours in pixels.

    Returns:
        (B, K, H, W).
    """
    around = _neighbours(images, dilations)
    # The spread over the neighbours of each distance and the pixel itself, as often as there are distances.
    seen = torch.cat([around, images.unsqueeze(2).expand(-1, -1, len(dilations), -1, -1)], 2)
    spread = seen.std(2, keepdim=True)
    nearness = -(images.unsqueeze(2) - around).abs() / (1e-8 + 0.1 * spread)
    weights = nearness.mean(1, keepdim=True).softmax(2)
    for _ in range(steps):
        maps = (_neighbours(maps, dilations) * weights).sum(2)
    return maps


def _neighbours(x: Tensor, dilations: Sequence[int]) -> Tensor:
    """Return the neighbours (B, C, 8 * distances, H, W) of each pixel; beyond the border stands the border."""
    height, width = x.shape[-2:]
    found = []
    for distance in dilations:
        padded = F.pad(x, (distance,) * 4, mode="replicate")
        for down, across in NEIGHBOURS:
            top, left = distance * (1 + down), distance * (1 + across)
            found.append(padded[..., top : top + height, left : left + width])
    return torch.stack(found, 2)
