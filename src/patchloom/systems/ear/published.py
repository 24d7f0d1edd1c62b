"""The recovery network in the layout of the first author's public code (random-mask inpainting)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from patchloom.models.published import fill, require
from patchloom.models.published_settings import Settings
from patchloom.systems.ear.unet import RecoveryUNet

SETTINGS = Settings(
    obeyed=("output",),
    idle=("dim_h", "dim_w", "ngpu", "nn", "path_ckpt", "learning_rate", "mode_optim", "mode_lr", "who_am_i"),
    other_names={"dim_c": "in_channels", "ksize": "kernel", "filters": "widths"},
)
PLACE = re.compile(r"modules\.(\d+)\.(?:up)?conv\.(enc|dec)_(\d+)_(1|2|3|out)_(conv|bn)\.(\w+)")


def load(state: Mapping[str, Tensor], **config: Any) -> nn.Module:
    """Return a `RecoveryUNet` with a state dict of the published code in it.

    Args:
        state: Tensors named `modules.{j}.conv.enc_{i}_{k}_conv.weight` and so on, j running over all layers.
        **config: `output`, clamp (published) or sigmoid. What shapes tell (`filters` with the image's channels or
            without, `dim_c`, `ksize`) may be given and has to agree.

    Raises:
        UsageError: Unknown setting, or tensors missing or left over.
    """
    require(state, "modules.0.conv.enc_1_1_conv.weight")
    widths = _widths(state)
    _, channels, kernel, _ = state["modules.0.conv.enc_1_1_conv.weight"].shape
    filters = config.get("filters", config.get("widths"))
    if filters is not None and len(filters) == len(widths) + 1 and filters[0] == channels:
        # The published list begins with the channels of the image.
        config = {name: value for name, value in config.items() if name != "filters"} | {"widths": list(filters[1:])}
    inferred = {"in_channels": channels, "kernel": kernel, "widths": list(widths), "width": widths[0]}
    settled = SETTINGS.settle(config, inferred)
    model = RecoveryUNet(channels, widths, settled.get("output", "clamp"), kernel)
    return fill(model, {_ours(name, len(widths)): value for name, value in state.items()}, published=_theirs(widths))


def _widths(state: Mapping[str, Tensor]) -> tuple[int, ...]:
    """Return the channels of each level, the bottleneck last."""
    widths: dict[int, int] = {}
    for name, value in state.items():
        match = PLACE.fullmatch(name)
        if match and match[2] == "enc" and match[4] == "1" and match[5] == "conv" and match[6] == "weight":
            widths[int(match[3])] = len(value)
    return tuple(widths[level] for level in sorted(widths))


def _names(levels: int) -> dict[str, str]:
    """Return our layers by the published names, without the words for convolution and norm."""
    kinds = {"1": "conv1", "2": "conv2", "3": "shrink"}
    layers = [(f"enc_{i}_{k}", "conv", f"down.{i - 1}.{kinds[k]}") for i in range(1, levels) for k in "123"]
    # The published code counts the image's channels as a level, so the bottleneck's number skips one.
    layers += [(f"enc_{levels + 1}_{k}", "conv", f"bottom.{int(k) - 1}") for k in "12"]
    grown = {"1": "grow", "2": "conv1", "3": "conv2"}
    layers += [
        (f"dec_{i}_{k}", "upconv" if k == "1" else "conv", f"up.{i - 1}.{grown[k]}")
        for i in range(1, levels)
        for k in "123"
    ]
    layers.append((f"dec_{levels}_out", "conv", "out"))
    return {f"modules.{number}.{kind}.{name}": ours for number, (name, kind, ours) in enumerate(layers)}


def _ours(name: str, levels: int) -> str:
    match = PLACE.fullmatch(name)
    layer = None if match is None else _names(levels).get(name.rpartition(".")[0].rpartition("_")[0])
    if match is None or layer is None or (layer == "out" and match[5] == "bn"):
        return name  # left over, as `fill` then says
    return f"{layer}.{match[6]}" if layer == "out" else f"{layer}.{0 if match[5] == 'conv' else 1}.{match[6]}"


def _theirs(widths: tuple[int, ...]) -> Any:
    names = {ours: published for published, ours in _names(len(widths)).items()}

    def published(name: str) -> str:
        layer, _, leaf = name.rpartition(".")
        if layer == "out":
            return f"{names[layer]}_conv.{leaf}"
        layer, _, part = layer.rpartition(".")
        return f"{names[layer]}_{'conv' if part == '0' else 'bn'}.{leaf}" if layer in names else name

    return published
