"""LoRA and its kin as a training method."""

from __future__ import annotations

from patchloom.encoders import Encoder
from patchloom.encoders.insertion import Insertion
from patchloom.systems.lora.config import LoRAConfig
from patchloom.systems.lora.model import LoRA
from patchloom.training.adapter import AdapterMethod


class LoRAMethod(AdapterMethod):
    """LoRA: low-rank updates of the frozen encoder's linear layers (extra: lora)."""

    config_class = LoRAConfig
    config: LoRAConfig

    def make_insertion(self, encoder: Encoder, num_classes: int) -> Insertion:
        """Return the updates and the head."""
        config = self.config
        return LoRA(
            encoder,
            rank=config.rank,
            alpha=config.alpha,
            targets=config.targets,
            dropout=config.dropout,
            dora=config.dora,
            rank_stabilized=config.rank_stabilized,
            num_classes=num_classes,
            pool=config.pool,
            train_pool_norm=config.train_pool_norm,
        )
