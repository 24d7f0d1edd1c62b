"""What stands out in an image: the attention of a frozen Vision Transformer, or its own edges.

Park et al. 2023, arXiv 2310.04010: the class token's attention in the last block of a DINO (Caron et al. 2021,
arXiv 2104.14294). Encoders whose class token does not look at objects (masked autoencoders) or that have none are asked
for their patch tokens instead; without any encoder the strength of the gradient does.

>>> import timm
>>> encoder = timm.create_model("vit_tiny_patch16_224", num_classes=0)
>>> AttentionSaliency(encoder)(torch.rand(2, 3, 256, 256)).shape
torch.Size([2, 1, 256, 256])
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchloom.encoders import (
    Encoder,
    class_attention,
    feature_map,
    grid_size,
    image_size,
    normalize,
    num_prefix_tokens,
    patch_size,
    require_tokens,
    set_image_size,
    tokens,
)
from patchloom.errors import UsageError, unknown_name
from patchloom.systems.ear.excision import FLAT, cell_means
from patchloom.systems.ear.losses import gradient_magnitude

Saliency = Literal["cls_attention", "pca", "token_norm", "gradient"]
Fusion = Literal["mean", "max", "min"]
TINY = 1e-12
POWER_STEPS = 100


class AttentionSaliency(nn.Module):
    """What stands out to a frozen encoder, one value for each pixel.

    The encoder sees a copy of the image of its own size, normalised by its own mean and standard deviation; of oblong
    images one of the same shape and about as many patches.

    Args:
        encoder: A ViT of timm; it is frozen. None for `gradient`.
        kind: `cls_attention`: the class token's attention in the last block (paper; of an encoder without class token
            the mean over all tokens'). `pca`: the first principal component of the image's patch tokens. `token_norm`:
            the length of what the last block's attention adds to each patch. `gradient`: the energy of the image's
            gradient, averaged over cells; without encoder.
        head_fusion: How the heads of `cls_attention` become one map (mean).
        cell: Side of the cells of `gradient`, in pixels.

    Raises:
        UsageError: An unknown kind or fusion, an encoder that is missing or no ViT, or a class token asked for that is
            not there.
    """

    def __init__(
        self,
        encoder: Encoder | None = None,
        kind: Saliency = "cls_attention",
        head_fusion: Fusion = "mean",
        cell: int = 8,
    ) -> None:
        super().__init__()
        if kind not in get_args(Saliency):
            raise unknown_name("saliency", kind, get_args(Saliency))
        if head_fusion not in get_args(Fusion):
            raise unknown_name("head_fusion", head_fusion, get_args(Fusion))
        if (encoder is None) != (kind == "gradient"):
            needs = "takes no encoder" if encoder is not None else "needs an encoder"
            raise UsageError(f"saliency={kind} {needs}; only gradient does without")
        if encoder is not None:
            require_tokens(encoder)
            encoder.requires_grad_(False).eval()
            if kind == "cls_attention" and not num_prefix_tokens(encoder):
                raise UsageError("saliency=cls_attention needs a class token, and the encoder has none; take pca")
        self.encoder, self.kind, self.head_fusion, self.cell = encoder, kind, head_fusion, cell
        self.own = (0, 0) if encoder is None else image_size(encoder)

    def train(self, mode: bool = True) -> AttentionSaliency:
        """Set the mode; the encoder stays in eval mode."""
        super().train(mode)
        if self.encoder is not None:
            self.encoder.eval()
        return self

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Return saliency (B, 1, H, W) in [0, 1], each image stretched to that range; 0 where a map is flat.

        Args:
            images: (B, C, H, W) in [0, 1].

        Raises:
            UsageError: The encoder cannot take images of this shape.
        """
        raw = self.coarse(images)
        return stretched(F.interpolate(raw, size=images.shape[-2:], mode="bilinear", align_corners=False), raw)

    def coarse(self, images: Tensor) -> Tensor:
        """Return the map over patches or cells, (B, 1, h, w), as it is."""
        if self.encoder is None:
            return gradient_energy(images, self.cell)
        inputs = shown_to(self.encoder, images, self.own)
        if self.kind == "cls_attention":
            heads = class_attention(self.encoder, inputs)
            fuse: dict[str, Any] = {"mean": heads.mean, "max": heads.amax, "min": heads.amin}
            fused = fuse[self.head_fusion](1)
        elif self.kind == "token_norm":
            fused = attention_norms(self.encoder, inputs)
        else:
            fused = first_component(feature_map(self.encoder, inputs).flatten(2).transpose(1, 2))
        return fused.unflatten(-1, grid_size(self.encoder, (inputs.shape[-2], inputs.shape[-1])))[:, None].to(
            images.dtype
        )


def shown_to(encoder: Encoder, images: Tensor, own_size: tuple[int, int]) -> Tensor:
    """Return what an encoder is shown of images (B, C, H, W) in [0, 1], and set it up for that size.

    Args:
        encoder: A ViT of timm.
        images: The images.
        own_size: Size the encoder was made for.

    Raises:
        UsageError: It cannot take images of this shape.
    """
    size = encoder_size((images.shape[-2], images.shape[-1]), own_size, patch_size(encoder))
    if size != image_size(encoder):
        set_image_size(encoder, size)
    return normalize(resized(images, size), encoder)


def encoder_size(size: tuple[int, int], own_size: tuple[int, int], patch: int) -> tuple[int, int]:
    """Return the size, whole patches of the encoder, that has the shape of `size` and about the area of `own_size`.

    >>> encoder_size((256, 256), (224, 224), 16), encoder_size((256, 128), (224, 224), 16)
    ((224, 224), (320, 160))
    """
    ratio = size[0] / size[1]
    area = own_size[0] * own_size[1]
    height = max(1, round((area * ratio) ** 0.5 / patch))
    width = max(1, round((area / ratio) ** 0.5 / patch))
    # Rounding must not turn an encoder away from its own size for a few pixels.
    near = abs(height * patch - own_size[0]) < patch and abs(width * patch - own_size[1]) < patch
    return own_size if near else (height * patch, width * patch)


def resized(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Return images (B, C, H, W) of another size, bilinear with antialiasing.

    As two products with matrices, which gives what `F.interpolate` gives and goes into ONNX as it is.
    """
    if tuple(images.shape[-2:]) == tuple(size):
        return images
    rows = _resizing(images.shape[-2], size[0]).to(images)
    columns = _resizing(images.shape[-1], size[1]).to(images)
    return rows @ images @ columns.T


def _resizing(before: int, after: int) -> Tensor:
    """Return what one side of an image is multiplied by, (after, before): triangles, wider where pixels get fewer."""
    scale = before / after
    width = max(scale, 1.0)
    centres = scale * (np.arange(after) + 0.5)[:, None]
    places = np.arange(before)[None]
    first, last = (np.floor(centres + side * width + 0.5) for side in (-1, 1))
    weights = np.clip(1 - np.abs(places + 0.5 - centres) / width, 0, None) * (places >= first) * (places < last)
    # A list, not an array: what is traced for ONNX takes it for a constant.
    return torch.tensor((weights / weights.sum(1, keepdims=True)).tolist(), dtype=torch.float64)


def stretched(saliency: Tensor, raw: Tensor | None = None) -> Tensor:
    """Return maps (B, 1, H, W) stretched to [0, 1] image by image; 0 everywhere where `raw` is flat.

    Args:
        saliency: The maps.
        raw: What they were made from, whose spread counts; default: the maps.
    """
    low, high = (end(saliency, (1, 2, 3)) for end in (_amin, _amax))
    values = (saliency - low) / (high - low + TINY)
    raw = saliency if raw is None else raw
    flat = _amax(raw, (1, 2, 3)) - _amin(raw, (1, 2, 3)) < FLAT
    return torch.where(flat, torch.zeros_like(values), values)


def _amin(values: Tensor, axes: tuple[int, ...]) -> Tensor:
    return values.amin(axes, keepdim=True)


def _amax(values: Tensor, axes: tuple[int, ...]) -> Tensor:
    return values.amax(axes, keepdim=True)


def gradient_energy(images: Tensor, cell: int) -> Tensor:
    """Return the squared gradient (Prewitt), averaged over channels and cells, (B, 1, h, w); the border is repeated.

    Args:
        images: (B, C, H, W) in [0, 1].
        cell: Side of a cell in pixels; the last ones of a row or column may be smaller.
    """
    # Beyond the border the image goes on: zeros there would be the strongest edge of all.
    around = F.pad(images, (1, 1, 1, 1), mode="replicate")
    energy = gradient_magnitude(around)[..., 1:-1, 1:-1].square().mean(1, keepdim=True)
    return cell_means(energy, cell)


def attention_norms(encoder: Encoder, images: Tensor) -> Tensor:
    """Return the length of the last block's attention output at every patch, (B, N).

    Raises:
        UsageError: The block has no attention of its own.
    """
    attention = getattr(encoder.blocks[-1], "attn", None)
    if attention is None:
        raise UsageError(
            f"a {type(encoder.blocks[-1]).__name__} has no attention apart from its MLP, so saliency=token_norm cannot "
            f"be taken; take pca"
        )
    attended: list[Tensor] = []
    hook = attention.register_forward_hook(lambda module, inputs, output: attended.append(output))
    try:
        count = tokens(encoder, images).patches.shape[1]
    finally:
        hook.remove()
    return attended[-1][:, -count:].norm(dim=-1)


def first_component(patches: Tensor) -> Tensor:
    """Return each patch's place along the first principal component of its image, (B, N).

    Its direction is the one in which few patches lie far out (positive skew), so that the rare stands out. Found by
    power iteration from the patch farthest from the mean: no draw, and the same result every time.

    Args:
        patches: (B, N, D).
    """
    centred = patches - patches.mean(1, keepdim=True)
    farthest = centred.norm(dim=-1, keepdim=True).argmax(1, keepdim=True).expand(-1, -1, centred.shape[-1])
    direction = centred.gather(1, farthest).transpose(1, 2)
    gram = centred.transpose(1, 2) @ centred
    for _ in range(POWER_STEPS):
        direction = gram @ direction
        direction = direction / direction.norm(dim=1, keepdim=True).clamp(min=TINY)
    places = (centred @ direction)[..., 0]
    skew = places.pow(3).sum(1, keepdim=True)
    return torch.where(skew < 0, -places, places)
