"""A linear classifier on a frozen encoder as a training method."""

from __future__ import annotations

from patchloom.encoders import Encoder
from patchloom.encoders.insertion import Insertion
from patchloom.systems.linear.config import LinearConfig
from patchloom.systems.linear.model import LinearHead
from patchloom.training.adapter import AdapterMethod


class LinearMethod(AdapterMethod):
    """A linear classifier on the frozen encoder, trained on augmented images."""

    config_class = LinearConfig
    config: LinearConfig

    def make_insertion(self, encoder: Encoder, num_classes: int) -> Insertion:
        """Return the head."""
        return LinearHead(encoder, num_classes, self.config.pool, self.config.train_pool_norm)
