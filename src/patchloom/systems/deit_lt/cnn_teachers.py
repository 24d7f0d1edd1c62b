"""The CNN teachers of DeiT-LT: CIFAR's small ResNets, and networks trained by PaCo.

PaCo: Cui et al. 2021, arXiv 2107.12028; as the published code of DeiT-LT (arXiv 2404.02900) uses them.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from patchloom.encoders.cifar_resnet import CIFARResNet, CosineHead

__all__ = ["CIFARResNet", "CosineHead", "PaCoTeacher"]


class PaCoTeacher(nn.Module):
    """What remains of a network trained by PaCo: its pooled features and a linear classifier.

    Args:
        backbone: Gives (B, feat_dim): a `CIFARResNet` or a timm model, without classifier.
        feat_dim: 64 or 2048.
        num_classes: C.
    """

    def __init__(self, backbone: Any, feat_dim: int, num_classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.linear = nn.Linear(feat_dim, num_classes)
        self.num_classes = num_classes

    @property
    def encoder(self) -> Any:
        """The same network as one model of timm, whose classifier is the linear layer; a copy, which a bundle holds."""
        model = copy.deepcopy(self.backbone)
        model.reset_classifier(self.num_classes)
        model.get_classifier().load_state_dict(self.linear.state_dict())
        return model.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, C) for (B, 3, H, W) normalised images."""
        logits: Tensor = self.linear(self.backbone(x))
        return logits
