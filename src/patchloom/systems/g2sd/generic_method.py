"""The first stage of G2SD as a training method: settings, views and masks, what the report shows.

The algorithm itself is in `generic`. "Generic-to-Specific Distillation of Masked Autoencoders", arXiv 2302.14771.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from patchloom.base.sizes import compact
from patchloom.data.base import Source, StreamSource
from patchloom.data.transforms import NoisyViews, PairedViews
from patchloom.encoders import Encoder, depth, embed_dim, image_size, intermediate_layers, normalize
from patchloom.encoders.masked_autoencoder import (
    MaskedAutoencoder,
    has_fixed_positions,
    initialize_as_mae,
    visible_count,
)
from patchloom.encoders.patches import patchify, unpatchify
from patchloom.errors import UsageError
from patchloom.features.geometry import linear_cka
from patchloom.models.bundle import read_lineage
from patchloom.models.parts import load_masked_model, save_parts
from patchloom.systems.g2sd.generic import GenericDistiller
from patchloom.systems.g2sd.generic_config import G2SDGenericConfig
from patchloom.training.frozen import leave_out, put_back
from patchloom.training.method import Method, Transform

if TYPE_CHECKING:
    from patchloom.report import Section

TEACHER = "model.teacher"


class G2SDGenericMethod(Method):
    """A small masked autoencoder learns what a large one's decoder holds, without labels (G2SD, first stage)."""

    config_class = G2SDGenericConfig
    config: G2SDGenericConfig

    def __init__(self, config: G2SDGenericConfig, source: Source | StreamSource) -> None:
        teacher = load_masked_model(config.teacher)
        if teacher.in_chans != config.in_chans:
            raise UsageError(f"the teacher takes {teacher.in_chans} channels, not {config.in_chans}; set in_chans")
        if config.image_size is None:
            config = replace(config, image_size=compact(image_size(teacher.encoder)))
        self._statistics = {name: teacher.encoder.pretrained_cfg[name] for name in ("mean", "std")}
        super().__init__(config, source)
        width = config.decoder_dim or default_decoder_dim(embed_dim(self.encoder))
        student = MaskedAutoencoder(
            self.encoder,
            decoder_dim=width,
            decoder_depth=config.decoder_depth,
            decoder_heads=config.decoder_heads or max(1, width // 32),
            mask_ratio=config.mask_ratio,
        )
        share = 0.5 if isinstance(teacher, MaskedAutoencoder) else 0.75
        layer = config.teacher_decoder_layer
        self.model = GenericDistiller(
            teacher,
            student,
            teacher_decoder_layer=max(1, round(share * teacher.hidden_blocks)) if layer is None else layer,
            target=config.target,
            beta=config.beta,
            encoder_loss_weight=config.encoder_loss_weight,
        )
        self.patches = student.grid[0] * student.grid[1]
        self.visible = visible_count(self.patches, config.mask_ratio)

    def build_encoder(self) -> Encoder:
        """Return the student's encoder; a fresh one is initialised as MAE's and takes the teacher's statistics."""
        config = self.config
        encoder = super().build_encoder()
        if config.init_from is None and not Path(config.encoder).exists():
            initialize_as_mae(encoder)
            encoder.pretrained_cfg = {**encoder.pretrained_cfg, **self._statistics}
        elif has_fixed_positions(encoder):
            encoder.pos_embed.requires_grad_(False)
        return encoder

    def transform(self) -> Transform:
        """Return the crop and the draw of the mask."""
        config = self.config
        views = PairedViews(
            self.input_size,
            scale=config.crop_scale,
            interpolation=config.interpolation,
            second_interpolation=config.interpolation,
            flip=config.flip,
        )
        return NoisyViews(views, self.patches)

    def training_loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return the loss, and how near the student's tokens are to the teacher's, apart for hidden and visible."""
        output = self.compare(self.pixels(batch["image"]), batch["noise"])
        losses = {"loss": output["loss"]}
        if self.logs_now() and self.config.target == "all":
            with torch.no_grad():
                losses |= self.nearness(output)
        return losses

    def compare(self, images: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """Return what `GenericDistiller` does, for images (B, C, H, W) in [0, 1]; each is shown what it is used to."""
        return self.model(
            normalize(images, self.encoder),
            noise,
            self.config.mask_ratio,
            teacher_images=normalize(images, self.model.teacher.encoder),
        )

    def nearness(self, output: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the mean cosine between predictions and targets, for hidden and for visible patches."""
        prefix = self.model.teacher.prefix
        cosine = F.cosine_similarity(output["prediction"], output["target"], dim=-1)[:, prefix:]
        hidden = output["mask"].bool()
        return {"hidden_cosine": cosine[hidden].mean(), "visible_cosine": cosine[~hidden].mean()}

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        """Return whether weight decay applies: to all but vectors (class and mask token decay, as published)."""
        return parameter.ndim > 1 and not name.endswith(".bias")

    def lineage(self) -> dict[str, Any]:
        """Return who taught the model."""
        name = self.config.teacher
        return {"teacher": {"path": name, "lineage": read_lineage(name)}}

    def summary(self) -> dict[str, Any]:
        """Return how much was hidden, and the sizes of teacher and decoder."""
        teacher = self.model.teacher
        decoder = [p for name, p in self.model.student.named_parameters() if not name.startswith("autoencoder.encoder")]
        return {
            "teacher": self.config.teacher,
            "teacher_parameters": sum(p.numel() for p in teacher.encoder.parameters()),
            "teacher_decoder_layer": self.model.layer,
            "patches": self.patches,
            "visible_patches": self.visible,
            "decoder_parameters": sum(p.numel() for p in decoder),
        }

    def save_model(self, model: Encoder, path: Path, lineage: dict[str, Any]) -> None:
        """Write the student's encoder as a bundle, and its decoder beside it: it can be a teacher in turn."""
        super().save_model(model, path, lineage)
        if self.config.strategy != "fsdp":
            save_parts(self.model.student.autoencoder, path)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        leave_out(checkpoint, TEACHER, self.model.teacher)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        put_back(checkpoint, TEACHER, self.model.teacher, f"the teacher {self.config.teacher}")

    @torch.no_grad()
    def report_sections(self, images: Tensor) -> list[Section]:
        """Return what teacher and student hold of held-out images, and how alike their layers are."""
        from patchloom.report import Section, image_grid

        images = self.pixels(images).to(self.device)
        table = self.alignment(images)
        text = (
            f"Held-out images, of whose {self.patches} patches both see {self.visible}. Below, the features of the "
            f"teacher's block {self.model.layer} and what the student makes of them, as the same three principal "
            f"components: where the colours agree, it knows what the teacher knows."
        )
        return [
            Section(
                title="Teacher features and student predictions",
                text=text,
                figures=[image_grid({name: row.float().cpu() for name, row in self.pictures(images).items()})],
            ),
            Section(
                title="Feature similarity (CKA) by layer",
                text="Linear centred kernel alignment of patch tokens on whole images, with the teacher's block at the "
                "same relative depth: 1 is the same up to rotation and scale.",
                table=table,
            ),
        ]

    def pictures(self, images: Tensor) -> dict[str, Tensor]:
        """Return rows of pictures: original, what is visible, the teacher's features and the student's in colours.

        Args:
            images: (n, C, H, W) in [0, 1].
        """
        from patchloom.report.figures import pca_colours

        distiller = self.model.eval()
        generator = torch.Generator().manual_seed(self.config.seed)
        noise = torch.rand(len(images), self.patches, generator=generator).to(images.device)
        student, teacher = distiller.student, distiller.teacher
        prediction, _, mask = student(normalize(images, self.encoder), noise, self.config.mask_ratio)
        held, _ = teacher.hidden(normalize(images, teacher.encoder), self.config.mask_ratio, noise, distiller.layer)
        held = F.layer_norm(held.float(), held.shape[-1:], eps=1e-6)
        both = torch.cat([held, prediction.float()])[:, teacher.prefix :].cpu()
        painted = F.interpolate(pca_colours(both, teacher.grid), size=images.shape[-2:], mode="nearest")
        size, channels = teacher.patch_shape, teacher.in_chans
        patches = patchify(images, size)
        shown = torch.where(mask.bool().unsqueeze(-1), torch.full_like(patches, 0.5), patches)
        return {
            "original": images,
            "visible": unpatchify(shown, size, teacher.grid, channels),
            "teacher": painted[: len(images)],
            "student": painted[len(images) :],
        }

    def alignment(self, images: Tensor) -> list[dict[str, object]]:
        """Return, for each block of the student, its likeness to the teacher's at the same relative depth.

        Args:
            images: (n, C, H, W) in [0, 1].
        """
        teacher = self.model.teacher.encoder
        student_depth, teacher_depth = depth(self.encoder), depth(teacher)
        pairs = [(block, max(1, round(block * teacher_depth / student_depth))) for block in range(1, student_depth + 1)]
        student_side, teacher_side = normalize(images, self.encoder), normalize(images, teacher)
        teacher_blocks = sorted({other for _, other in pairs})
        mine = intermediate_layers(self.encoder.eval(), student_side, range(student_depth), norm=False)
        teacher_layers = intermediate_layers(teacher, teacher_side, [other - 1 for other in teacher_blocks], norm=False)
        theirs = dict(zip(teacher_blocks, teacher_layers, strict=True))
        return [
            {
                "student's block": block - 1,
                "teacher's block": other - 1,
                "alignment": f"{linear_cka(tokens.patches.flatten(0, 1), theirs[other].patches.flatten(0, 1)):.3f}",
            }
            for (block, other), tokens in zip(pairs, mine, strict=True)
        ]


def default_decoder_dim(width: int) -> int:
    """Return the width of the student's decoder: two thirds of the encoder's, in steps of 32.

    >>> default_decoder_dim(384), default_decoder_dim(192), default_decoder_dim(96)
    (256, 128, 64)
    """
    return max(32, width * 2 // 3 // 32 * 32)
