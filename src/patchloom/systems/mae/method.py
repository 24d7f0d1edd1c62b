"""MAE as a training method: settings, crops and masks, pictures; the thorax recipe is its preset.

The algorithm itself is in `encoders.masked_autoencoder`. Papers: "Masked Autoencoders Are Scalable Vision Learners",
arXiv 2111.06377; preset `thorax`: "Delving into Masked Autoencoders for Multi-Label Thorax Disease Classification",
arXiv 2210.12843.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from patchloom.data.base import Source, StreamSource
from patchloom.data.transforms import IMAGENET_MEAN, IMAGENET_STD, NoisyViews, PairedViews
from patchloom.encoders import Encoder, normalize
from patchloom.encoders.masked_autoencoder import (
    MaskedAutoencoder,
    has_fixed_positions,
    initialize_as_mae,
    visible_count,
)
from patchloom.encoders.patches import patchify, unpatchify
from patchloom.models.parts import save_parts
from patchloom.systems.mae.config import MAEConfig
from patchloom.training.method import Method, Transform

if TYPE_CHECKING:
    from patchloom.report import Section

__all__ = ["MAEConfig", "MAEMethod", "MaskedAutoencoder"]


class MAEMethod(Method):
    """Reconstruction of hidden patches from the visible ones (MAE)."""

    config_class = MAEConfig
    config: MAEConfig

    def __init__(self, config: MAEConfig, source: Source | StreamSource) -> None:
        super().__init__(config, source)
        # The published model owns the encoder; here it is the engine's, and shared.
        self.model = MaskedAutoencoder(
            self.encoder,
            config.decoder_dim,
            config.decoder_depth,
            config.decoder_heads,
            config.norm_pix_loss,
            config.mask_ratio,
        )
        self.patches = self.model.grid[0] * self.model.grid[1]
        self.visible = visible_count(self.patches, config.mask_ratio)

    def build_encoder(self) -> Encoder:
        """Return the encoder, initialised as published where it is fresh, with the statistics of the settings."""
        config = self.config
        encoder = super().build_encoder()
        fresh = config.init_from is None and not Path(config.encoder).exists()
        if fresh:
            initialize_as_mae(encoder, config.fixed_positions)
        elif has_fixed_positions(encoder):
            encoder.pos_embed.requires_grad_(False)
        given = {"mean": config.mean, "std": config.std}
        if fresh:
            given = {
                "mean": config.mean or config.channel_mean or IMAGENET_MEAN,
                "std": config.std or config.channel_std or IMAGENET_STD,
            }
        encoder.pretrained_cfg = {**encoder.pretrained_cfg, **{k: v for k, v in given.items() if v is not None}}
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
            color_jitter=config.color_jitter,
        )
        return NoisyViews(views, self.patches)

    def training_loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return the mean squared error over the hidden patches."""
        images = normalize(self.pixels(batch["image"]), self.encoder)
        return {"loss": self.model.loss(images, noise=batch["noise"])}

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        """Return whether weight decay applies: to all but vectors (class and mask token decay, as published)."""
        return parameter.ndim > 1 and not name.endswith(".bias")

    def summary(self) -> dict[str, Any]:
        """Return how much was hidden, and the size of the decoder."""
        decoder = [p for name, p in self.model.named_parameters() if not name.startswith("encoder.")]
        return {
            "patches": self.patches,
            "visible_patches": self.visible,
            "decoder_parameters": sum(p.numel() for p in decoder),
        }

    def save_model(self, model: Encoder, path: Path, lineage: dict[str, Any]) -> None:
        """Write the encoder as a bundle, and the decoder beside it."""
        super().save_model(model, path, lineage)
        if self.config.strategy != "fsdp":  # no process holds the whole decoder; it is in the checkpoint
            save_parts(self.model, path)

    @torch.no_grad()
    def report_sections(self, images: Tensor) -> list[Section]:
        """Return what the network makes of held-out images of which it sees a few patches."""
        from patchloom.report import Section, image_grid

        rows = self.pictures(self.pixels(images).to(self.device))
        note = (
            " It predicts each patch up to its brightness and contrast; these are taken from the original here."
            if self.config.norm_pix_loss
            else ""
        )
        return [
            Section(
                title="Masked input and reconstruction",
                text=f"Held-out images. Of {self.patches} patches it sees {self.visible}.{note} The last row shows "
                "what it was shown beside what it predicts.",
                figures=[image_grid({name: row.float().cpu() for name, row in rows.items()})],
            )
        ]

    def pictures(self, images: Tensor) -> dict[str, Tensor]:
        """Return rows of pictures: original, what is visible, predictions, predictions among what is visible.

        Args:
            images: (n, C, H, W) in [0, 1].
        """
        self.model.eval()
        size, grid, channels = self.model.patch_shape, self.model.grid, self.model.in_chans
        generator = torch.Generator().manual_seed(self.config.seed)
        noise = torch.rand(len(images), self.patches, generator=generator).to(images.device)
        inputs = normalize(images, self.encoder)
        hidden = (noise.argsort(1).argsort(1) >= self.visible).unsqueeze(-1)
        reconstruction = self._denormalized(self.model.reconstruct(inputs, noise=noise)).clamp(0, 1)
        patches = patchify(images, size)
        shown = unpatchify(torch.where(hidden, torch.full_like(patches, 0.5), patches), size, grid, channels)
        return {"original": images, "visible": shown, "reconstruction": reconstruction}

    def _denormalized(self, images: Tensor) -> Tensor:
        """Return normalised images in [0, 1] again."""
        zero = normalize(torch.zeros_like(images[:1]), self.encoder)
        one = normalize(torch.ones_like(images[:1]), self.encoder)
        return (images - zero) / (one - zero)
