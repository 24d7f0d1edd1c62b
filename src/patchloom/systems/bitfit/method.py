"""BitFit as a training method."""

from __future__ import annotations

from patchloom.encoders import Encoder
from patchloom.encoders.insertion import Insertion
from patchloom.systems.bitfit.config import BitFitConfig
from patchloom.systems.bitfit.model import BitFit
from patchloom.training.adapter import AdapterMethod


class BitFitMethod(AdapterMethod):
    """BitFit: the encoder's biases and a classifier."""

    config_class = BitFitConfig
    config: BitFitConfig

    def make_insertion(self, encoder: Encoder, num_classes: int) -> Insertion:
        """Return the biases and the head."""
        return BitFit(encoder, num_classes, self.config.pool, self.config.train_pool_norm)
