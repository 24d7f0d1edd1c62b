"""PH-Reg as a training method: the crop, the views, what trains, the schedule by epoch, and what the report shows.

The algorithm itself is in `model`. Chen et al. 2025, arXiv 2505.21501.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import timm
import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as F

from patchloom.base.sizes import Size
from patchloom.data.base import Source, StreamSource
from patchloom.data.pixels import resize
from patchloom.encoders import Encoder, create_encoder, grid_size, in_chans, normalize, set_image_size
from patchloom.encoders.positions import DINOV2_RULE, PositionRule, patch_positions, resample_positions
from patchloom.errors import UsageError
from patchloom.models.bundle import fetch_encoder
from patchloom.models.start import start_encoder
from patchloom.systems.ph_reg.clip import CLIPPHReg
from patchloom.systems.ph_reg.comparison import Comparison, compare
from patchloom.systems.ph_reg.config import PHRegConfig
from patchloom.systems.ph_reg.model import PHReg
from patchloom.systems.ph_reg.registers import check_takes_registers
from patchloom.systems.ph_reg.saved import is_dense, save_dense
from patchloom.systems.ph_reg.towers import Tower, is_tower, open_tower
from patchloom.systems.ph_reg.views import sample_offsets
from patchloom.training.frozen import leave_out, put_back
from patchloom.training.inputs import read_as
from patchloom.training.method import Method, Transform
from patchloom.training.run import is_first_process

if TYPE_CHECKING:
    from patchloom.report import Section

TEACHER = "model.teacher"
SHOWN = 6
CLIP_SIZE = 448
LONG_RUN = 10
"""Epochs from which on a learning rate that falls by epoch is near enough to one that falls by step."""


class PHRegMethod(Method):
    """An encoder with fresh registers learns what it says on average over shifted views: features without artefacts."""

    config_class = PHRegConfig
    config: PHRegConfig

    def __init__(self, config: PHRegConfig, source: Source | StreamSource) -> None:
        super().__init__(config, source)

    def build_encoder(self) -> Encoder:
        """Return the student: the encoder of the settings with registers in it. The teacher is made along with it."""
        config = self.config
        settings: dict[str, Any] = {
            "num_registers": config.registers,
            "views": config.views,
            "shift_fraction": config.shift_fraction,
            "mse_scale": config.mse_scale,
            "unlock_pos_embed": config.unlock_pos_embed,
            "unlock_patch_embed": config.unlock_patch_embed,
            "teacher_chunk": config.teacher_chunk,
        }
        if config.unlock_blocks is not None:
            settings["unlock_blocks"] = config.unlock_blocks
        if is_tower(config.encoder):
            encoder, projection = open_original_tower(config)
            settings["neighbour_std"] = config.neighbour_std
            self.model: PHReg = CLIPPHReg(read_as(encoder, config), projection, **settings)
        else:
            self.model = PHReg(read_as(open_original(config), config), **settings)
        return self.model.student

    def transform(self) -> Transform:
        """Return the crop, and the draw of the teacher's views."""
        config = self.config
        return SquareCrop(self.input_size[0], self.model.teacher.grid, config.views, config.shift_fraction)

    def training_loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return the loss with its parts."""
        images = normalize(self.pixels(batch["image"]), self.encoder)
        output = self.model(images, batch["offsets"], batch["flips"])
        return {name: output[name] for name in ("loss", "cosine", "mse")}

    def rates(self, step: int) -> tuple[float, float]:
        """Return the learning rate and weight decay of a step: an exponential fall to `min_lr`, without warm-up.

        By epoch, as published, the rate changes after every step to that of the epoch's end, so the first step alone
        has the whole of it.
        """
        config, span = self.config, self.span
        peak = self.peak_lr()
        least = min(config.min_lr, peak)
        within, epochs = step - span.start, math.ceil(span.steps / span.per_epoch)
        if self.falls_by_epoch(epochs):
            share = 0.0 if within == 0 else ((within - 1) // span.per_epoch + 1) / epochs
        else:
            share = within / span.steps
        return falling(peak, least, share), config.weight_decay

    def falls_by_epoch(self, epochs: int) -> bool:
        """Return whether the learning rate of a run falls by epoch."""
        falls = self.config.lr_falls
        return falls == "epoch" or (falls == "auto" and epochs >= LONG_RUN)

    def on_fit_start(self) -> None:
        """Say how the learning rate falls where that was left open and is not as published."""
        epochs = math.ceil(self.span.steps / self.span.per_epoch)
        if self.config.lr_falls == "auto" and not self.falls_by_epoch(epochs) and is_first_process():
            passes = "epoch" if epochs == 1 else "epochs"
            print(f"note: the run has {epochs} {passes}, so the learning rate falls by step", file=sys.stderr)

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        """Return whether weight decay applies: to all that trains, registers and positions too, as published."""
        return True

    def after_step(self) -> None:
        """Put registers the encoder had before back to what they were."""
        self.model.hold_old_registers()

    def describe(self) -> dict[str, Any]:
        """Return what the log and the report say about the model."""
        return {**super().describe(), "registers": self.config.registers, "views": self.config.views}

    def summary(self) -> dict[str, Any]:
        """Return the artefacts of the encoder before and after, and how far it is from the mean over views."""
        found = self.comparison()
        return {} if found is None else found.figures

    def comparison(self) -> Comparison | None:
        """Return how original and student do on held-out images, looked at once; None where there are too few."""
        if "_comparison" not in self.__dict__:
            self.__dict__["_comparison"] = compare(self)
        found: Comparison | None = self.__dict__["_comparison"]
        return found

    @torch.no_grad()
    def report_sections(self, images: Tensor) -> list[Section]:
        """Return artefacts before and after, with pictures."""
        from patchloom.systems.ph_reg.pages import sections

        found = self.comparison()
        if found is None or not len(images):
            return []
        return sections(self, found, self.pixels(images[:SHOWN]).to(self.device))

    def save_model(self, model: Encoder, path: Path, lineage: dict[str, Any]) -> None:
        """Write the student as a bundle, and beside it the projection of a CLIP tower."""
        super().save_model(model, path, lineage)
        if isinstance(self.model, CLIPPHReg):
            save_dense(self.model.dense, path)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        leave_out(checkpoint, TEACHER, self.model.teacher)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        put_back(checkpoint, TEACHER, self.model.teacher, f"the encoder {self.config.encoder}")


class SquareCrop:
    """The shorter side resized to a side, a random square along the longer one; and the views of the teacher.

    Smaller images are enlarged first. There are no other augmentations, as published.

    Args:
        size: Side in pixels.
        grid: Patches along it.
        views: See `sample_offsets`.
        shift_fraction: Likewise.
    """

    def __init__(self, size: int, grid: int, views: int, shift_fraction: float) -> None:
        self.size, self.grid, self.views, self.shift_fraction = size, grid, views, shift_fraction

    def __call__(self, image: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Return `image` (C, size, size), of the type of the image, `offsets` (V, 2) int64 and `flips` (V,) bool."""
        height, width = image.shape[-2:]
        scale = self.size / min(height, width)
        high, wide = max(self.size, round(height * scale)), max(self.size, round(width * scale))
        whole = resize(image, (high, wide), "bicubic")
        top = int(torch.randint(high - self.size + 1, (), generator=generator))
        left = int(torch.randint(wide - self.size + 1, (), generator=generator))
        crop = F.crop(whole, top, left, self.size, self.size).contiguous()
        offsets, flips = sample_offsets(self.grid, self.views, self.shift_fraction, generator)
        return {"image": crop, "offsets": offsets, "flips": flips}


def falling(start: float, end: float, share: float) -> float:
    """Return the value after a share of an exponential fall from `start` to `end`.

    >>> falling(1e-4, 1e-6, 0.5)
    1e-05
    """
    return max(start * (end / start) ** share, end)


def open_original(config: PHRegConfig) -> Encoder:
    """Return the trained encoder of the settings at their image size.

    Raises:
        UsageError: There is no such encoder, it has no trained weights, or the size does not fit its patches.
    """
    if Path(config.encoder).exists():
        if is_dense(config.encoder):
            raise UsageError(f"{config.encoder} is a CLIP tower that was cleaned already; give the tower it came from")
        encoder = start_encoder(config.encoder, in_chans=config.in_chans)
    else:
        if timm.is_model(config.encoder):  # refused before anything is fetched
            with torch.device("meta"):
                plain: Any = timm.create_model(config.encoder, num_classes=0)
            check_takes_registers(plain)
        encoder = fetch_encoder(config.encoder, create_encoder, in_chans=config.in_chans)
    if config.image_size is not None:
        set_size(encoder, config.image_size, PositionRule(antialias=False) if config.interpolation != "timm" else None)
    return encoder


def open_original_tower(config: PHRegConfig) -> Tower:
    """Return the CLIP tower of the settings at their image size, its positions resampled as published.

    Raises:
        UsageError: See `open_tower`; or a size that does not fit its patches, or images of other than 3 channels.
    """
    tower = open_tower(config.encoder)
    if (channels := in_chans(tower.encoder)) != config.in_chans:
        raise UsageError(f"{config.encoder} takes {channels} channels, not {config.in_chans}; set in_chans={channels}")
    set_size(tower.encoder, CLIP_SIZE if config.image_size is None else config.image_size, DINOV2_RULE)
    return tower


def set_size(encoder: Encoder, size: Size, rule: PositionRule | None) -> None:
    """Set an encoder up for another size, in place; its positions are resampled by a rule, else by timm's."""
    before, positions = grid_size(encoder), encoder.pos_embed
    set_image_size(encoder, size)
    if rule is not None and isinstance(positions, Tensor):
        prefix = patch_positions(positions, before)
        with torch.no_grad():
            encoder.pos_embed.copy_(resample_positions(positions, before, grid_size(encoder), prefix, rule))
