"""Visual prompt tuning as a training method."""

from __future__ import annotations

from patchloom.encoders import Encoder
from patchloom.encoders.insertion import Insertion
from patchloom.systems.vpt.config import VPTConfig
from patchloom.systems.vpt.model import VisualPrompts
from patchloom.training.adapter import AdapterMethod


class VPTMethod(AdapterMethod):
    """Visual prompt tuning: learnt tokens in front of the frozen encoder's own."""

    config_class = VPTConfig
    config: VPTConfig

    def make_insertion(self, encoder: Encoder, num_classes: int) -> Insertion:
        """Return the prompts and the head."""
        config = self.config
        return VisualPrompts(
            encoder,
            num_prompts=config.num_prompts,
            depth=config.depth,
            dropout=config.dropout,
            num_classes=num_classes,
            pool=config.pool,
            train_pool_norm=config.train_pool_norm,
        )
