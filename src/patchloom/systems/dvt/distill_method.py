"""Teaching an encoder what its denoiser makes of it: the third stage of DVT, after which a denoiser costs nothing.

Yang et al. 2024 (arXiv 2401.02957): a copy of the whole encoder, all of which trains, is to give by itself the features
that encoder and denoiser give together.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from patchloom.base.sizes import compact, pair, size_text
from patchloom.data.base import Source, StreamSource
from patchloom.data.pixels import resize
from patchloom.data.sample import Transform
from patchloom.encoders import Encoder, depth, normalize
from patchloom.encoders.denoised import denoised, denoising_loss, encoder_features
from patchloom.errors import UsageError
from patchloom.systems.dvt.config import NO_ENCODER, DVTDistillConfig
from patchloom.systems.dvt.method import DVTSchedule
from patchloom.systems.dvt.saved import find_encoder, load_denoiser
from patchloom.training.frozen import leave_out, put_back
from patchloom.training.inputs import open_training_images, read_as
from patchloom.training.method import Method


class WholeView:
    """A whole image at the size of the features, out of proportion, mirrored at random.

    Args:
        size: (height, width).
        flip: Probability that it is mirrored.
    """

    def __init__(self, size: tuple[int, int], flip: float) -> None:
        self.size, self.flip = size, flip

    def __call__(self, image: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Return {"image": (C, *size)}, of the type of the image (C, H, W)."""
        view = resize(image, self.size)
        return {"image": view.flip(-1) if float(torch.rand((), generator=generator)) < self.flip else view}


class DVTDistillMethod(DVTSchedule, Method):
    """An encoder learns what its denoiser makes of it, and needs none any more (DVT, third stage).

    Attributes:
        teacher: Encoder and denoiser, frozen.
    """

    config_class = DVTDistillConfig
    config: DVTDistillConfig

    @classmethod
    def open_data(cls, config: Any) -> tuple[Source | StreamSource, Any]:
        """Return the images, and the settings with the encoder and the size that the denoiser was made for."""
        _, about = load_denoiser(config.teacher)
        size = (int(about["image_size"][0]), int(about["image_size"][1]))
        if config.image_size is not None and pair(config.image_size) != size:
            raise UsageError(
                f"the denoiser in {config.teacher} is for images of {size_text(size)} pixels, and image_size is "
                f"{size_text(config.image_size)}; leave it out"
            )
        settled: dict[str, Any] = {"image_size": compact(size)}
        if config.encoder == NO_ENCODER:
            settled["encoder"] = about["encoder"]
        return open_training_images(dataclasses.replace(config, **settled))

    def build_encoder(self) -> Encoder:
        """Return the student, a copy of the encoder the denoiser is for; the two together are the teacher."""
        denoiser, about = load_denoiser(self.config.teacher)
        encoder, layer = find_encoder(about, self.config.encoder), int(about["layer"])
        student = copy.deepcopy(encoder)
        if layer + 1 < depth(student):
            made = student.patchloom_args
            student.blocks = student.blocks[: layer + 1]
            student.patchloom_args = {**made, "model_args": {**made["model_args"], "depth": layer + 1}}
        self.teacher = denoised(encoder, denoiser, layer).requires_grad_(False).eval()
        return read_as(student.requires_grad_(True).train(), self.config)

    def transform(self) -> Transform:
        """Return what data workers do to an image."""
        return WholeView(self.input_size, self.config.flip)

    def training_loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return how far the student's features are from the denoised ones of the teacher."""
        images = normalize(self.pixels(batch["image"]), self.encoder)
        with torch.no_grad():
            target, _ = encoder_features(self.teacher, images)
        made, _ = encoder_features(self.encoder, images)
        return denoising_loss(made, target)

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        """Return whether weight decay applies: to everything, as published."""
        return True

    def train(self, mode: bool = True) -> DVTDistillMethod:
        """Set the mode; the teacher stays in eval mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        leave_out(checkpoint, "teacher", self.teacher)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        put_back(checkpoint, "teacher", self.teacher, self.config.teacher)

    def lineage(self) -> dict[str, Any]:
        """Return what taught it."""
        return {"teacher": self.config.teacher}
