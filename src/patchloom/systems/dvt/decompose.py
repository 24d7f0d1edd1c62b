"""The first stage of DVT for images in memory: views, features, the fit, and what it makes of the whole image.

>>> from patchloom.systems.dvt.decompose import denoise_image
>>> found = denoise_image("vit_small_patch14_dinov2", image, image_size=518)  # doctest: +SKIP
>>> found.denoised.shape  # doctest: +SKIP
torch.Size([37, 37, 384])
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from patchloom.base.sizes import pair, size_text
from patchloom.data.order import draw_seed
from patchloom.data.pixels import resize, unit
from patchloom.data.survey import notice
from patchloom.encoders import (
    Encoder,
    depth,
    embed_dim,
    image_size,
    normalize,
    plane_size,
    require_tokens,
    set_image_size,
)
from patchloom.encoders.patches import patch_grid
from patchloom.encoders.properties import patch_shape
from patchloom.errors import UsageError
from patchloom.features.extract import torch_device
from patchloom.models.bundle import open_encoder
from patchloom.systems.dvt.config import DecomposeConfig
from patchloom.systems.dvt.field import fitting_resolution
from patchloom.systems.dvt.fit import FitSettings, fit, fit_in_threads
from patchloom.systems.dvt.model import SingleImageDenoiser
from patchloom.systems.dvt.views import draw_views, view_coords, view_features

FEW_VIEWS, LARGE_CROPS = 64, 0.9
NARROW = 128
"""Features narrower than this have a rank that half of it as hidden width would bound."""
BASE_RESOLUTION = 16
VIEWS_SHARE = 0.1
"""What the features of views are of the work, about."""


@dataclass(frozen=True)
class DenoisedImage:
    """The features of an image, taken apart; all (H, W, C) float32 on the CPU."""

    raw: Tensor
    """As the encoder has them."""
    denoised: Tensor
    """The field over the whole image."""
    artifact: Tensor
    """What hangs on the position alone."""
    residual: Tensor
    """What hangs on both."""
    losses: dict[str, float]
    """Of the last step; of images in the same operations (on a GPU) their mean."""

    @property
    def subtracted(self) -> Tensor:
        """What artefact and residual leave of the raw features: another way to clean them."""
        return self.raw - self.artifact - self.residual

    @property
    def artifact_share(self) -> float:
        """Variance of the artefact over positions as a share of that of the raw features."""
        varied = [(part - part.mean((0, 1))).square().sum() for part in (self.artifact, self.raw)]
        return float(varied[0] / varied[1].clamp(min=1e-12))


def default_size(encoder: Encoder) -> tuple[int, int]:
    """Return the size of images: the paper's, or the encoder's own where that is below 224 pixels."""
    own, patch = image_size(encoder), patch_shape(encoder)[-1]
    if max(own) < 224:
        return own
    side = 518 if patch == 14 else round(512 / patch) * patch
    return side, side


def settled(encoder: Encoder, config: DecomposeConfig) -> dict[str, Any]:
    """Return what the settings leave open, found for an encoder: `image_size`, `layer`, `max_resolution`, `hidden_dim`.

    Raises:
        UsageError: An encoder of no images, a block it does not have, or a size that patches do not fill.
    """
    require_tokens(encoder)
    plane_size(encoder, "the maps that are taken apart")
    if config.layer is not None and config.layer >= depth(encoder):
        raise UsageError(f"layer is {config.layer}; the encoder has blocks 0 to {depth(encoder) - 1}")
    size = default_size(encoder) if config.image_size is None else pair(config.image_size)
    grid = patch_grid(size, patch_shape(encoder))
    width = embed_dim(encoder)
    hidden = (width // 2 if width >= NARROW else 4 * width) if config.hidden_dim is None else config.hidden_dim
    finest = config.max_resolution or max(BASE_RESOLUTION, fitting_resolution(max(grid), config.crop_scale[0]))
    return {
        "image_size": size,
        "grid": (int(grid[0]), int(grid[1])),
        "layer": depth(encoder) - 1 if config.layer is None else config.layer,
        "hidden_dim": hidden,
        "max_resolution": finest,
        "width": width,
    }


def warn_of_views(config: DecomposeConfig) -> None:
    """Say that views cannot tell the image from the position, where that is so."""
    if config.num_views < FEW_VIEWS:
        notice(
            f"note: {config.num_views} views are too few to tell the image from the position; give at least {FEW_VIEWS}"
        )
    if config.crop_scale[0] >= LARGE_CROPS:
        notice(
            f"note: crops of at least {config.crop_scale[0]:.0%} of the image show every part at nearly the same "
            f"position, so that image and position cannot be told apart; give a smaller crop_scale"
        )


def bytes_of_image(config: DecomposeConfig, found: dict[str, Any]) -> int:
    """Return the memory that an image takes while it is fitted: features of its views, and the weights four times."""
    tokens = math.prod(found["grid"])
    held = (config.num_views + 1) * tokens * (found["width"] * (4 if config.views_dtype == "float32" else 2) + 8)
    with torch.device("meta"):
        model = new_model(config, found)
    step = 20 * config.batch_tokens * found["width"] * 4
    return held + 16 * sum(parameter.numel() for parameter in model.parameters()) + step


def new_model(config: DecomposeConfig, found: dict[str, Any]) -> SingleImageDenoiser:
    """Return a fresh model of one image."""
    return SingleImageDenoiser(
        found["width"],
        found["grid"],
        hidden_dim=found["hidden_dim"],
        encoder=config.field,
        n_levels=config.levels,
        base_resolution=BASE_RESOLUTION,
        max_resolution=found["max_resolution"],
    )


def denoise_images(
    encoder: Encoder,
    images: Sequence[Tensor],
    config: DecomposeConfig,
    found: dict[str, Any],
    numbers: Sequence[int],
    device: torch.device,
    reach: Callable[[float], Any] = lambda share: None,
) -> list[DenoisedImage]:
    """Take the features of a few images apart, side by side.

    Args:
        encoder: Set up for the size in `found`, in eval mode, on the device.
        images: (C, height, width) each, uint8 or float in [0, 1], of any size.
        config: The settings.
        found: What `settled` returned.
        numbers: Number of each image, which its draws hang on.
        device: Where to compute.
        reach: Called with the share of the work that is done.
    """
    held = torch.device("cpu") if config.views_device == "cpu" else device
    count, tokens = config.num_views + 1, math.prod(found["grid"])
    features = torch.empty(
        len(images), count, tokens, found["width"], dtype=getattr(torch, config.views_dtype), device=held
    )
    coords = torch.empty(len(images), count, tokens, 2, device=held)
    generators, models = [], []
    for position, (image, number) in enumerate(zip(images, numbers, strict=True)):
        generator = torch.Generator().manual_seed(draw_seed(config.seed, 0, number, "dvt"))
        views = draw_views(config.num_views, found["image_size"], config.crop_scale, config.flip, generator)
        pixels = normalize(resize(unit(image), found["image_size"])[None].to(device), encoder)[0]
        maps = view_features(encoder, pixels, views, found["layer"], config.batch_size)
        features[position] = maps.flatten(1, 2)
        places = [view_coords(view, found["image_size"], found["grid"], config.coordinates) for view in views]
        coords[position] = torch.stack(places).flatten(1, 2)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(draw_seed(config.seed, 0, number, "dvt weights"))
            models.append(new_model(config, found))
        generators.append(generator)
        reach(VIEWS_SHARE * (position + 1) / len(images))
    settings = FitSettings(config.steps, config.batch_tokens, config.lr, config.lr / 10)

    def note(step: int) -> None:
        reach(VIEWS_SHARE + (1 - VIEWS_SHARE) * step / config.steps)

    if device.type == "cpu" and len(models) > 1:
        losses = fit_in_threads(models, features, coords, generators, settings, note)
        model = SingleImageDenoiser.stack(models)
    else:
        model = SingleImageDenoiser.stack(models).to(device)
        losses = fit(model, features, coords, generators, settings, note)
    shape = (len(images), *found["grid"], -1)
    raw, whole = features[:, -1].to(device).float().reshape(shape), coords[:, -1].to(device).reshape(shape)
    parts = {name: value.float().cpu() for name, value in model.decompose(raw, whole).items()}
    raw = raw.cpu()
    return [
        DenoisedImage(
            raw[i],
            parts["denoised"][i],
            parts["artifact"][i],
            parts["residual"][i],
            {name: values[i] for name, values in losses.items()},
        )
        for i in range(len(images))
    ]


def denoise_image(encoder: Any, image: Tensor, **settings: Any) -> DenoisedImage:
    """Take the features of one image apart.

    Args:
        encoder: Bundle, run, name of a timm model with published weights, or a module.
        image: (C, H, W), uint8 or float in [0, 1], of any size.
        **settings: Fields of `DecomposeConfig`: num_views, steps, image_size …

    Raises:
        UsageError: No such encoder, or settings that do not fit.
    """
    config = DecomposeConfig(encoder=encoder, data="-", out="-", **settings)
    device, model, found = opened(config)
    return denoise_images(model, [image], config, found, [0], device)[0]


def opened(config: DecomposeConfig) -> tuple[torch.device, Encoder, dict[str, Any]]:
    """Return the device, the encoder set up for the size of the views, and what `settled` returns; says what was found.

    Raises:
        UsageError: As `settled`.
    """
    device = torch_device(config.device)
    encoder = copy.deepcopy(open_encoder(config.encoder))  # a module of the user's stays as it is
    found = settled(encoder, config)
    warn_of_views(config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # grids that are not square
        set_image_size(encoder, found["image_size"])
    grid = found["grid"]
    notice(
        f"images of {size_text(found['image_size'])} pixels, block {found['layer']}, {grid[0]} x {grid[1]} tokens of "
        f"width {found['width']}; field of {config.levels} levels up to {found['max_resolution']}, hidden width "
        f"{found['hidden_dim']}"
    )
    return device, encoder.to(device).eval().requires_grad_(False), found
