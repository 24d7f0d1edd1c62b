"""Published decoders written out a second time, with plain functions of torch; and small images with masks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F


def bilinear(x: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def conv_bn(state: dict[str, Tensor], name: str, x: Tensor, norm: str = "bn") -> Tensor:
    """Return ReLU of BatchNorm of a convolution without bias, in eval mode."""
    weight = state[f"{name}.conv.weight"]
    x = F.conv2d(x, weight, padding=weight.shape[-1] // 2)
    mean, var, scale, shift = (
        state[f"{name}.{norm}.{part}"][:, None, None] for part in ("running_mean", "running_var", "weight", "bias")
    )
    return ((x - mean) / (var + 1e-5).sqrt() * scale + shift).clamp(min=0)


def upernet(state: dict[str, Tensor], maps: list[Tensor], norm: str = "bn", last: str = "conv_seg") -> Tensor:
    """Return UPerNet's logits (Xiao et al. 2018, mmsegmentation 0.x)."""
    top = maps[-1]
    pooled = [top]
    for number, scale in enumerate((1, 2, 3, 6)):
        small = conv_bn(state, f"psp_modules.{number}.1", F.adaptive_avg_pool2d(top, scale), norm)
        pooled.append(bilinear(small, top.shape[-2:]))
    laterals = [conv_bn(state, f"lateral_convs.{i}", maps[i], norm) for i in range(3)]
    laterals.append(conv_bn(state, "bottleneck", torch.cat(pooled, 1), norm))
    for i in (3, 2, 1):
        laterals[i - 1] = laterals[i - 1] + bilinear(laterals[i], laterals[i - 1].shape[-2:])
    outs = [conv_bn(state, f"fpn_convs.{i}", laterals[i], norm) for i in range(3)] + [laterals[3]]
    joined = torch.cat([bilinear(x, outs[0].shape[-2:]) for x in outs], 1)
    return F.conv2d(conv_bn(state, "fpn_bottleneck", joined, norm), state[f"{last}.weight"], state[f"{last}.bias"])


def upernet_layout(
    widths: tuple[int, ...], channels: int, classes: int, norm: str = "bn", last: str = "conv_seg"
) -> dict[str, Tensor]:
    """Return UPerNet's tensors with random values."""
    state: dict[str, Tensor] = {}

    def add(name: str, out: int, into: int, kernel: int) -> None:
        state[f"{name}.conv.weight"] = torch.randn(out, into, kernel, kernel) * 0.2
        for part in ("weight", "bias", "running_mean"):
            state[f"{name}.{norm}.{part}"] = torch.randn(out)
        state[f"{name}.{norm}.running_var"] = torch.rand(out) + 0.5
        state[f"{name}.{norm}.num_batches_tracked"] = torch.tensor(3)

    for number in range(4):
        add(f"psp_modules.{number}.1", channels, widths[-1], 1)
    add("bottleneck", channels, widths[-1] + 4 * channels, 3)
    for number, width in enumerate(widths[:-1]):
        add(f"lateral_convs.{number}", channels, width, 1)
        add(f"fpn_convs.{number}", channels, channels, 3)
    add("fpn_bottleneck", channels, 4 * channels, 3)
    state[f"{last}.weight"], state[f"{last}.bias"] = torch.randn(classes, channels, 1, 1), torch.randn(classes)
    return state


def fcn_layout(
    width: int, channels: int, classes: int, norm: str = "bn", last: str = "conv_seg", concat: bool = False
) -> dict[str, Tensor]:
    """Return the auxiliary head's tensors with random values."""
    state: dict[str, Tensor] = {}
    for name, into in [("convs.0", width)] + [("conv_cat", width + channels)] * concat:
        state[f"{name}.conv.weight"] = torch.randn(channels, into, 3, 3) * 0.2
        for part in ("weight", "bias", "running_mean"):
            state[f"{name}.{norm}.{part}"] = torch.randn(channels)
        state[f"{name}.{norm}.running_var"] = torch.rand(channels) + 0.5
    state[f"{last}.weight"], state[f"{last}.bias"] = torch.randn(classes, channels, 1, 1), torch.randn(classes)
    return state


def randomised(module: torch.nn.Module) -> torch.nn.Module:
    """Return a module in float64 and eval mode, every parameter and running statistic drawn anew."""
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point():
            fresh = torch.rand_like(tensor) + 0.5 if name.endswith("running_var") else torch.randn_like(tensor) * 0.3
            tensor.copy_(fresh)
    return module.double().eval()


def paint_pairs(root: Path, count: int = 4, size: tuple[int, int] = (40, 52), classes: int = 3, seed: int = 0) -> Path:
    """Write images of coloured rectangles with their indexed masks to root/images and root/masks; return root."""
    rng = np.random.default_rng(seed)
    tones = np.array([[30, 40, 60], [200, 60, 50], [60, 190, 80], [220, 210, 90]], np.uint8)
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True)
    for number in range(count):
        mask = np.zeros(size, np.uint8)
        for value in range(1, classes):
            top, left = rng.integers(0, size[0] // 2), rng.integers(0, size[1] // 2)
            mask[top : top + size[0] // 3, left : left + size[1] // 3] = value
        noise = rng.integers(0, 30, (*size, 3), dtype=np.uint8)
        Image.fromarray(tones[mask] + noise).save(root / "images" / f"{number}.png")
        indexed = Image.fromarray(mask, "P")
        indexed.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0, 255, 255, 0])
        indexed.save(root / "masks" / f"{number}.png")
    return root
