"""Supervised training from scratch: DeiT's recipe for ViTs, and the one that gives CNN teachers of long-tailed sets.

Touvron et al. 2021, arXiv 2012.12877; for the CNNs what DeiT-LT (arXiv 2404.02900) asks of teachers: LDAM with deferred
re-weighting (Cao et al. 2019, arXiv 1906.07413) by sharpness-aware minimisation (Foret et al. 2021, arXiv 2010.01412).
"""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor

from patchloom.data.base import Source, StreamSource
from patchloom.encoders import Encoder
from patchloom.errors import UsageError
from patchloom.systems.scratch.config import ScratchConfig
from patchloom.training.margins import LDAM, classify_by_angle_, cosines, has_linear_head
from patchloom.training.supervised import SupervisedMethod


class ScratchMethod(SupervisedMethod):
    """Supervised training of any timm model from fresh weights."""

    kinds = ("image", "clip", "volume")
    config_class = ScratchConfig
    config: ScratchConfig

    def __init__(self, config: ScratchConfig, source: Source | StreamSource) -> None:
        super().__init__(config, source)
        self.margins: LDAM | None = None
        if config.loss == "ldam":
            if self.targets.kind != "single" or self.targets.counts is None:
                raise UsageError(f"loss=ldam needs one class per image and a folder; {config.data} is something else")
            self.margins = LDAM(self.targets.counts, config.ldam_margin, config.ldam_scale)

    def build_encoder(self) -> Encoder:
        """Return the model; where it is trained on cosines its classifier has no bias.

        Raises:
            UsageError: LDAM, and a model that does not classify by one linear layer.
        """
        model = super().build_encoder()
        if self.config.loss == "ldam":
            if not has_linear_head(model):
                raise UsageError(
                    f"loss=ldam needs a model that classifies by one linear layer; {self.config.encoder} does not"
                )
            classify_by_angle_(model)
            if model.get_classifier().bias is not None:
                model.get_classifier().bias.requires_grad_(False)
        return model

    def training_loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return the loss against the labels."""
        if self.margins is None:
            return super().training_loss(batch)
        images, labels = self.mixed(batch)
        weights = self.targets.weights if self.targets.weighing else None
        return {"loss": self.margins(cosines(self.encoder, images), labels, weights)}

    def bundle_model(self) -> Encoder:
        """Return what is shipped; trained on cosines, a plain model whose first choice is that of the cosines."""
        model = super().bundle_model()
        if self.margins is None:
            return model
        model = copy.deepcopy(model)
        classify_by_angle_(model)
        return model
