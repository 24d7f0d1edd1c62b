"""Hi-End-MAE as a training method: crops, masks, pictures (Tan et al. 2025, arXiv 2502.08347)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from patchloom.data.base import Source, StreamSource
from patchloom.data.volume_crops import VolumeCrops
from patchloom.encoders import Encoder, create_encoder, normalize
from patchloom.encoders.masked_autoencoder import initialize_as_mae
from patchloom.encoders.patches import patchify, unpatchify
from patchloom.errors import UsageError
from patchloom.models.parts import save_parts
from patchloom.models.start import load_weights, start_encoder
from patchloom.systems.hi_end_mae.config import HiEndMAEConfig
from patchloom.systems.hi_end_mae.model import HiEndMAE
from patchloom.training.inputs import read_as
from patchloom.training.method import Method, Transform

if TYPE_CHECKING:
    from patchloom.report import Section

__all__ = ["HiEndMAE", "HiEndMAEConfig", "HiEndMAEMethod"]


class HiEndMAEMethod(Method):
    """Reconstruction of hidden patches of volumes by a decoder that asks the encoder's layers (Hi-End-MAE)."""

    config_class = HiEndMAEConfig
    config: HiEndMAEConfig
    kinds = ("volume",)

    def __init__(self, config: HiEndMAEConfig, source: Source | StreamSource) -> None:
        super().__init__(config, source)
        self.model = HiEndMAE(
            self.encoder,
            config.decoder_dim,
            config.decoder_heads,
            config.decoder_depth,
            config.memory_layers,
            config.mask_ratio,
        )

    def build_encoder(self) -> Encoder:
        """Return the encoder, initialised as published where it is fresh."""
        config, made = self.config, Path(self.config.encoder).exists()
        shape: dict[str, Any] = {} if config.fixed_positions or made else {"positions": "learned"}
        if config.patch_size is not None:
            if made:
                raise UsageError(f"patch_size is {config.patch_size}, and {config.encoder} has its own; leave it out")
            shape["patch_size"] = config.patch_size
        sizes: dict[str, Any] = {
            "image_size": config.image_size,
            "in_chans": config.in_chans,
            "drop_path": config.drop_path,
        }
        encoder = start_encoder(config.encoder, create_encoder, **sizes, **shape)
        if config.init_from is not None:
            load_weights(encoder, config.init_from, self.starting_weights)
        elif not made:
            initialize_as_mae(encoder, fixed_positions=False)
            if encoder.pos_embed is not None and encoder.pos_embed.requires_grad:
                nn.init.normal_(encoder.pos_embed, std=0.02)
        return read_as(encoder, config)

    def transform(self) -> Transform:
        """Return the crops of a volume; which patches are hidden is drawn beside the model."""
        config = self.config
        return VolumeCrops(
            self.sample_size,
            config.crops,
            config.foreground_share,
            config.flip,
            config.rotate,
            config.jitter,
            config.jitter_prob,
            config.spacing,
        )

    def training_loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return the mean squared error over the hidden patches of all crops."""
        crops = self.pixels(self.samples(batch)).flatten(0, 1)
        return {"loss": self.model.loss(normalize(crops, self.encoder))}

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        """Return whether weight decay applies to a parameter."""
        return self.config.decay_all or (super().decays(name, parameter) and not name.endswith("mask_token"))

    def summary(self) -> dict[str, Any]:
        """Return how much was hidden, and the size of the decoder."""
        beside = [p for name, p in self.model.named_parameters() if not name.startswith("encoder.") and p.requires_grad]
        return {
            "patches": self.model.patches,
            "visible_patches": self.model.visible,
            "decoder_parameters": sum(p.numel() for p in beside),
        }

    def save_model(self, model: Encoder, path: Path, lineage: dict[str, Any]) -> None:
        """Write the encoder as a bundle, and the decoder beside it."""
        super().save_model(model, path, lineage)
        if self.config.strategy != "fsdp":  # no process holds the whole decoder; it is in the checkpoint
            save_parts(self.model, path)

    @torch.no_grad()
    def report_sections(self, images: Tensor) -> list[Section]:
        """Return what the network makes of held-out volumes of which it sees a few patches."""
        from patchloom.report import Section, image_grid

        if not len(images):
            return []
        rows = self.pictures(self.pixels(images).to(self.device))
        return [
            Section(
                title="Masked input and reconstruction",
                text=f"The slice in the middle of held-out volumes. Of {self.model.patches} patches the network sees "
                f"{self.model.visible}. It predicts each patch up to its brightness and contrast; these are taken from "
                "the original here.",
                figures=[image_grid({name: row.float().cpu() for name, row in rows.items()})],
            )
        ]

    def pictures(self, volumes: Tensor) -> dict[str, Tensor]:
        """Return rows of middle slices (n, C, H, W): input, what is visible of it, reconstruction.

        Args:
            volumes: (n, C, D, H, W) in [0, 1].
        """
        model = self.model.eval()
        generator = torch.Generator().manual_seed(self.config.seed)
        order = torch.rand(len(volumes), model.patches, generator=generator).argsort(1).to(volumes.device)
        inputs = normalize(volumes, self.encoder)
        made = self._denormalized(model.reconstruct(inputs, order)).clamp(0, 1)
        patches = patchify(volumes, model.patch_shape)
        hidden = (order.argsort(1) >= model.visible).unsqueeze(-1)
        shown = torch.where(hidden, torch.full_like(patches, 0.5), patches)
        masked = unpatchify(shown, model.patch_shape, model.grid, model.in_chans)
        middle = volumes.shape[2] // 2
        rows = {"input": volumes, "masked": masked, "reconstruction": made}
        return {name: row[:, :, middle] for name, row in rows.items()}

    def _denormalized(self, volumes: Tensor) -> Tensor:
        """Return normalised volumes in [0, 1] again."""
        zero = normalize(torch.zeros_like(volumes[:1]), self.encoder)
        one = normalize(torch.ones_like(volumes[:1]), self.encoder)
        return (volumes - zero) / (one - zero)
