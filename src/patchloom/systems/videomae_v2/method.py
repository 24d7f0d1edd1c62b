"""VideoMAE V2 as a training method: settings, crops and masks of clips, pictures.

The algorithm itself is in `model`. Wang et al. 2023, arXiv 2303.16727.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from patchloom.data.base import Source, StreamSource
from patchloom.data.clip_views import MultiScaleCrops
from patchloom.data.sample import Sample
from patchloom.data.survey import notice
from patchloom.encoders import Encoder, embed_dim, grid_size, normalize
from patchloom.encoders.masking import draw_running_cell_mask, draw_tube_mask
from patchloom.encoders.patches import Grid, patchify, unpatchify
from patchloom.models.parts import save_parts
from patchloom.systems.videomae_v2.config import VideoMAEV2Config
from patchloom.systems.videomae_v2.model import VideoMaskedAutoencoder, initialize_as_videomae
from patchloom.training.method import Method, Transform

if TYPE_CHECKING:
    from patchloom.report import Section

SHOWN = 4
"""Clips in the report."""


class VideoMAEV2Method(Method):
    """Reconstruction of hidden tubes of clips by a decoder of some of them (VideoMAE V2)."""

    kinds = ("clip",)
    config_class = VideoMAEV2Config
    config: VideoMAEV2Config

    def __init__(self, config: VideoMAEV2Config, source: Source | StreamSource) -> None:
        super().__init__(config, source)
        width = config.decoder_dim or min(512, embed_dim(self.encoder) // 2)
        self.model = VideoMaskedAutoencoder(
            self.encoder,
            width,
            config.decoder_depth,
            config.decoder_heads or heads_of(width),
            decoder_init_values=config.layer_scale,
            cos_attn=config.cos_attn,
            normalize_target=config.normalize_target,
        )
        self.masks = DualMasks(self.model.grid, config.mask_ratio, decoder_ratio(config))
        hidden, left_out = self.masks(torch.Generator().manual_seed(0))  # refuses what cannot be
        share = decoder_ratio(config)
        if share is not None and (taken := int(4 * share) / 4) != share:
            notice(f"a running cell leaves out 1, 2 or 3 of 4 tokens: decoder_mask_ratio {share:g} is {taken:g}")
        self.visible, self.decoded = int((~hidden).sum()), int((~left_out).sum())

    def build_encoder(self) -> Encoder:
        """Return the encoder, initialised as published where it is fresh."""
        encoder = super().build_encoder()
        if self.config.init_from is None and not Path(self.config.encoder).exists():
            initialize_as_videomae(encoder)
        return encoder

    def encoder_arguments(self) -> dict[str, Any]:
        """Return what a fresh encoder has: a norm of tokens, and the variants of attention and scale."""
        config = self.config
        scale = {"init_values": config.layer_scale} if config.layer_scale else {}
        return {"fc_norm": False} | scale | ({"cos_attn": True} if config.cos_attn else {})

    def transform(self) -> Transform:
        """Return the crops and masks of a clip."""
        return MaskedClips(
            MultiScaleCrops(self.sample_size, flip=self.config.flip), self.masks, self.config.views_per_clip
        )

    def training_loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return the mean squared error over the tokens that are hidden and decoded, of all views."""
        pixels = self.pixels(batch["clip"].flatten(0, 1))
        clips = normalize(pixels, self.encoder)
        hidden, left_out = batch["hidden"].flatten(0, 1), batch["left_out"].flatten(0, 1)
        return {"loss": self.model.loss(clips, hidden, left_out, pixels, self.config.loss_on)}

    def least_lr(self) -> float:
        """Return the learning rate at the end, which is scaled to the batch as the others are."""
        return self.config.min_lr * self.peak_lr() / self.config.lr

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        """Return whether weight decay applies: not to vectors, the mask token and scales of attention, as published."""
        return parameter.ndim > 1 and not name.endswith((".bias", ".scale", "mask_token"))

    def summary(self) -> dict[str, Any]:
        """Return how much was seen and decoded, and the size of the decoder."""
        decoder = [p for name, p in self.model.named_parameters() if not name.startswith("encoder.")]
        return {
            "tokens": math.prod(self.model.grid),
            "visible_tokens": self.visible,
            "decoded_tokens": self.decoded,
            "decoder_parameters": sum(p.numel() for p in decoder),
        }

    def save_model(self, model: Encoder, path: Path, lineage: dict[str, Any]) -> None:
        """Write the encoder as a bundle, and the decoder beside it."""
        super().save_model(model, path, lineage)
        if self.config.strategy != "fsdp":  # no process holds the whole decoder; it is in the checkpoint
            save_parts(self.model, path)

    @torch.no_grad()
    def report_sections(self, images: Tensor) -> list[Section]:
        """Return what the network makes of held-out clips of which it sees a few tokens."""
        from patchloom.report import Section
        from patchloom.report.pictures import sample_figure

        rows = self.pictures(self.pixels(images[:SHOWN]).to(self.device))
        figures = [
            sample_figure(
                self.source.kind,
                [Sample(clips[number].float().cpu(), -1, name) for name, clips in rows.items()],
            )
            for number in range(len(next(iter(rows.values()))))
        ]
        note = (
            " It predicts each tube up to its brightness and contrast; these are taken from the original here."
            if self.config.normalize_target
            else ""
        )
        tokens = math.prod(self.model.grid)
        return [
            Section(
                title="Hidden tubes and reconstruction",
                text=f"Held-out clips, a few frames of each. Of {tokens} tokens the encoder sees {self.visible}, and "
                f"the decoder predicts {self.decoded} in a step of training; here all that are hidden.{note}",
                figures=figures,
            )
        ]

    def pictures(self, pixels: Tensor) -> dict[str, Tensor]:
        """Return rows of clips: original, what is visible, predictions among what is visible.

        Args:
            pixels: (n, C, T, H, W) in [0, 1].
        """
        self.model.eval()
        shape, channels = self.model.patch_shape, self.model.in_chans
        generator = torch.Generator().manual_seed(self.config.seed)
        hidden = torch.stack([self.masks(generator)[0] for _ in pixels]).to(pixels.device)
        tubes = patchify(pixels, shape, "hwc")
        shown = torch.where(hidden.unsqueeze(-1), torch.full_like(tubes, 0.5), tubes)
        grid: Grid = grid_size(self.encoder, tuple(pixels.shape[2:]))
        return {
            "original": pixels,
            "visible": unpatchify(shown, shape, grid, channels, "hwc"),
            "reconstruction": unpatchify(self.model.reconstruct(pixels, hidden), shape, grid, channels, "hwc"),
        }


class DualMasks:
    """Draws which tokens of a clip are hidden from the encoder, and which the decoder leaves out.

    Args:
        grid: Tokens, (time, down, across).
        ratio: Share of the places hidden.
        decoder_ratio: Share of the tokens that the decoder leaves out by running cells; None: it predicts all that is
            hidden.
    """

    def __init__(self, grid: Grid, ratio: float, decoder_ratio: float | None) -> None:
        self.grid, self.ratio, self.decoder_ratio = grid, ratio, decoder_ratio

    def __call__(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return both masks, (N,) bool."""
        hidden = draw_tube_mask(self.grid, self.ratio, generator).flatten()
        if self.decoder_ratio is None:
            return hidden, ~hidden
        return hidden, draw_running_cell_mask(self.grid, self.decoder_ratio, generator).flatten()


class MaskedClips:
    """Several views of a clip, each with masks of its own.

    Args:
        view: Makes one of them.
        masks: Draws its masks.
        count: How many.
    """

    def __init__(self, view: Transform, masks: DualMasks, count: int) -> None:
        self.view, self.masks, self.count = view, masks, count

    def __call__(self, clip: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Return {"clip": (count, C, T, H, W), "hidden": (count, N), "left_out": (count, N)}."""
        views = [self.view(clip, generator)["clip"] for _ in range(self.count)]
        masks = [self.masks(generator) for _ in range(self.count)]
        return {
            "clip": torch.stack(views),
            "hidden": torch.stack([hidden for hidden, _ in masks]),
            "left_out": torch.stack([left_out for _, left_out in masks]),
        }


def decoder_ratio(config: VideoMAEV2Config) -> float | None:
    """Return the share of the tokens that the decoder leaves out by running cells; None where it does not."""
    return None if config.decoder_mask == "none" else config.decoder_mask_ratio


def heads_of(width: int) -> int:
    """Return one head for 64 channels, or the nearest fewer that divide the width."""
    return next(heads for heads in range(max(1, width // 64), 0, -1) if width % heads == 0)
