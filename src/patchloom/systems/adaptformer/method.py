"""AdaptFormer as a training method."""

from __future__ import annotations

from patchloom.data.clip_views import MultiScaleCrops
from patchloom.data.kinds import require_kind
from patchloom.encoders import Encoder
from patchloom.encoders.insertion import Insertion
from patchloom.systems.adaptformer.config import AdaptFormerConfig
from patchloom.systems.adaptformer.model import AdaptFormer
from patchloom.training.adapter import AdapterMethod
from patchloom.training.method import Transform


class AdaptFormerMethod(AdapterMethod):
    """AdaptFormer: a narrow two-layer branch beside every MLP of the frozen encoder."""

    config_class = AdaptFormerConfig
    config: AdaptFormerConfig

    def make_insertion(self, encoder: Encoder, num_classes: int) -> Insertion:
        """Return the adapters and the head."""
        config = self.config
        return AdaptFormer(
            encoder,
            bottleneck=config.bottleneck,
            scale="learnable" if config.learnable_scale else config.scale,
            dropout=config.dropout,
            placement=config.placement,
            input=config.input,
            norm=config.norm,
            init=config.init,
            blocks=config.blocks,
            num_classes=num_classes,
            pool=config.pool,
            train_pool_norm=config.train_pool_norm,
        )

    def transform(self) -> Transform:
        """Return the paper's crops of clips where they are asked for, else random crops and flips."""
        if not self.config.multi_scale:
            return super().transform()
        require_kind(self.source, ("clip",), "multi_scale")
        return MultiScaleCrops(self.sample_size, flip=self.config.flip)
