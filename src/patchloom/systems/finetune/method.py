"""End-to-end fine-tuning for classification, by the recipe of BEiT and CCViT.

Layer-wise learning rates, stochastic depth, RandAugment, mixup, cutmix, random erasing, label smoothing, mean
pooling over patches: the recipe of BEiT (Bao et al. 2021, arXiv 2106.08254) and CCViT (arXiv 2303.04664).
"""

from __future__ import annotations

from torch import nn

from patchloom.systems.finetune.config import FinetuneConfig
from patchloom.training.supervised import SupervisedMethod


class FinetuneMethod(SupervisedMethod):
    """End-to-end fine-tuning of all weights for classification."""

    kinds = ("image", "clip", "volume")
    config_class = FinetuneConfig
    config: FinetuneConfig

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        """Return whether weight decay applies; relative-position tables as the settings say."""
        if name.endswith("relative_position_bias_table") and not self.config.relative_position_decay:
            return False
        return super().decays(name, parameter)
