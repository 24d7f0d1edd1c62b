"""The CNN teachers of DeiT-LT: CIFAR's small ResNets, and networks trained by PaCo.

He et al. 2016 (section 4.2, shortcut A); Cui et al. 2021, arXiv 2107.12028. Specification `deit_lt`, section 2.2.

>>> CIFARResNet(20, 10)(torch.randn(2, 3, 32, 32)).shape
torch.Size([2, 10])
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from patchloom.errors import UsageError


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut without weights: every second pixel, zeros for channels that are new."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outer)
        self.conv2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outer)
        self.stride, self.padding = stride, outer // 4 if (stride != 1 or inner != outer) else 0

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output for (B, C, H, W)."""
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.padding:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))
        return F.relu(out + x)


class CosineHead(nn.Module):
    """A classifier by angle: features and class vectors of unit length. Its weight is stored (D, C)."""

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, num_classes).uniform_(-1, 1))
        with torch.no_grad():
            self.weight.copy_(F.normalize(self.weight, dim=0))

    def forward(self, x: Tensor) -> Tensor:
        """Return cosines (B, C)."""
        return F.normalize(x, dim=1) @ F.normalize(self.weight, dim=0)


class CIFARResNet(nn.Module):
    """A ResNet for 32-pixel images: three stages of 16, 32 and 64 channels.

    Args:
        depth: 6 n + 2: 20, 32, 44 …
        num_classes: C; 0 for the 64 features alone.
        cosine_head: Classify by angle, as after training by LDAM.

    Raises:
        UsageError: Another depth.
    """

    def __init__(self, depth: int = 32, num_classes: int = 10, cosine_head: bool = False) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise UsageError(f"depth is {depth}; a CIFAR ResNet has 6 n + 2 layers, such as 20 or 32")
        blocks = (depth - 2) // 6
        self.num_features, self.num_classes = 64, num_classes
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)

        def stage(inner: int, outer: int, stride: int) -> nn.Sequential:
            first = BasicBlock(inner, outer, stride)
            return nn.Sequential(first, *(BasicBlock(outer, outer, 1) for _ in range(blocks - 1)))

        self.layer1, self.layer2, self.layer3 = stage(16, 16, 1), stage(16, 32, 2), stage(32, 64, 2)
        self.fc: nn.Module = nn.Identity()
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
        if num_classes:
            self.fc = CosineHead(64, num_classes) if cosine_head else nn.Linear(64, num_classes)

    def features(self, x: Tensor) -> Tensor:
        """Return (B, 64) for (B, 3, H, W)."""
        x = F.relu(self.bn1(self.conv1(x)))
        return self.layer3(self.layer2(self.layer1(x))).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, C); cosines with a cosine head."""
        logits: Tensor = self.fc(self.features(x))
        return logits


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

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, C) for (B, 3, H, W) normalised images."""
        logits: Tensor = self.linear(self.backbone(x))
        return logits
