"""Segmentation with ViT-CoMer as a run: the encoder, the CNN beside it and UPerNet train together.

Xia et al. 2024 (CVPR 2024, arXiv 2403.07392).
"""

from __future__ import annotations

from typing import Any

from patchloom.base.sizes import Size, pair
from patchloom.encoders import Encoder, patch_size, set_image_size
from patchloom.segment.method import SegmentMethod
from patchloom.segment.schedule import poly
from patchloom.systems.vit_comer.config import ViTCoMerConfig
from patchloom.systems.vit_comer.model import STRIDE
from patchloom.systems.vit_comer.parts import add_layer_scale, crop_size, takes_any_size
from patchloom.training.schedule import cosine, warmup_steps


class ViTCoMerMethod(SegmentMethod):
    """A CNN beside the encoder, which trains along, and UPerNet on the pyramid of both (ViT-CoMer)."""

    head_name = "vit_comer"
    config_class = ViTCoMerConfig
    config: ViTCoMerConfig

    def encoder_size(self) -> Size | None:
        """Return None: the encoder keeps the size it was made for, and its positions are resampled in passing."""
        return None

    def build_encoder(self) -> Encoder:
        """Return the encoder, of the windows' size where it can be of no other."""
        config, encoder = self.config, super().build_encoder()
        if config.image_size is not None and not takes_any_size(encoder):
            patch = patch_size(encoder)
            height, width = (side * patch // STRIDE for side in pair(config.image_size))
            set_image_size(encoder, (height, width))
        if config.layer_scale and config.train_encoder:
            add_layer_scale(encoder)
        return encoder

    @property
    def input_size(self) -> tuple[int, int]:
        """Height and width of the windows that are trained on, in pixels."""
        size = self.config.image_size
        return crop_size(self.encoder) if size is None else pair(size)

    def decoder_settings(self) -> dict[str, Any]:
        """Return what `parts.build` makes the model of."""
        config = self.config
        return {
            "conv_width": config.conv_width,
            "deform_heads": config.deform_heads,
            "deform_ratio": config.deform_ratio,
            "num_points": config.num_points,
            "cffn_ratio": config.cffn_ratio,
            "mrfp_ratio": config.mrfp_ratio,
            "use_to_vit": config.use_to_vit,
            "use_to_cnn": config.use_to_cnn,
            "cnn_interaction": config.cnn_interaction,
            "num_extra": config.num_extra,
            "window_size": config.window_size,
            "vit_features": None if config.vit_features == "none" else config.vit_features,
            "drop_path": config.drop_path,
            "init_values": config.init_values,
        }

    def rates(self, step: int) -> tuple[float, float]:
        """Return the learning rate, which falls along a straight line, as published, and the weight decay of a step."""
        config, span = self.config, self.span
        warmup = warmup_steps(config.warmup_epochs, span.per_epoch, span.steps)
        peak, within = self.peak_lr(), step - span.start
        lr = poly(within, span.steps, peak, end=min(config.min_lr, peak), warmup=warmup)
        end = config.weight_decay if config.weight_decay_end is None else config.weight_decay_end
        return lr, cosine(within, span.steps, config.weight_decay, end)
