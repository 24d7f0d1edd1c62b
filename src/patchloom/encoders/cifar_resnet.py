"""CIFAR's small ResNets as timm models: `cifar_resnet8` to `cifar_resnet110`.

He et al. 2016, section 4.2, shortcut A. The teachers of long-tailed recognition are of this kind.

>>> import timm, torch, patchloom
>>> timm.create_model("cifar_resnet20", num_classes=10)(torch.randn(2, 3, 32, 32)).shape
torch.Size([2, 10])
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import SelectAdaptivePool2d
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

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
        in_chans: Channels of the images.

    Raises:
        UsageError: Another depth.
    """

    def __init__(self, depth: int = 32, num_classes: int = 10, cosine_head: bool = False, in_chans: int = 3) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise UsageError(f"depth is {depth}; a CIFAR ResNet has 6 n + 2 layers, such as 20 or 32")
        blocks = (depth - 2) // 6
        self.in_chans, self.cosine_head = in_chans, cosine_head
        self.num_features = self.head_hidden_size = 64
        self.grad_checkpointing = False
        self.conv1 = nn.Conv2d(in_chans, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)

        def stage(inner: int, outer: int, stride: int) -> nn.Sequential:
            first = BasicBlock(inner, outer, stride)
            return nn.Sequential(first, *(BasicBlock(outer, outer, 1) for _ in range(blocks - 1)))

        self.layer1, self.layer2, self.layer3 = stage(16, 16, 1), stage(16, 32, 2), stage(32, 64, 2)
        self.feature_info = [
            {"num_chs": 16 * 2**number, "reduction": 2**number, "module": f"layer{number + 1}"} for number in range(3)
        ]
        self.global_pool = SelectAdaptivePool2d(pool_type="avg", flatten=True)
        self.fc: nn.Module = nn.Identity()
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
        self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a fresh classifier in place; none for 0 classes."""
        self.num_classes = num_classes
        self.fc = nn.Identity()
        if num_classes:
            self.fc = CosineHead(64, num_classes) if self.cosine_head else nn.Linear(64, num_classes)

    def get_classifier(self) -> nn.Module:
        """Return the classifier."""
        return self.fc

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the stages' activations in the backward pass."""
        self.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return how timm groups the parameters by layer."""
        return {"stem": r"^conv1|bn1", "blocks": r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)"}

    def _stages(self, x: Tensor) -> list[Tensor]:
        x = F.relu(self.bn1(self.conv1(x)))
        maps = []
        for stage in (self.layer1, self.layer2, self.layer3):
            recompute = self.grad_checkpointing and torch.is_grad_enabled()
            x = checkpoint(stage, x, use_reentrant=False) if recompute else stage(x)
            maps.append(x)
        return maps

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return the maps of stages by number, after the last map unless `intermediates_only`; as timm's models do."""
        if output_fmt != "NCHW":
            raise UsageError(f"output_fmt is {output_fmt}; a CIFAR ResNet gives NCHW")
        taken, _ = feature_take_indices(3, indices)
        maps = self._stages(x)
        intermediates = [maps[number] for number in taken]
        return intermediates if intermediates_only else (maps[-1], intermediates)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the last map, (B, 64, H / 4, W / 4)."""
        return self._stages(x)[-1]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits (B, C) of the last map, or with `pre_logits` its mean over places (B, 64)."""
        pooled: Tensor = self.global_pool(x)
        return pooled if pre_logits else self.fc(pooled)

    def features(self, x: Tensor) -> Tensor:
        """Return (B, 64) for (B, 3, H, W)."""
        return self.forward_head(self.forward_features(x), pre_logits=True)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, C); cosines with a cosine head."""
        return self.forward_head(self.forward_features(x))


def _cfg() -> dict[str, Any]:
    return {
        "num_classes": 10,
        "input_size": (3, 32, 32),
        "pool_size": (8, 8),
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        # Of CIFAR-10's training images.
        "mean": (0.4914, 0.4822, 0.4465),
        "std": (0.2470, 0.2435, 0.2616),
        "first_conv": "conv1",
        "classifier": "fc",
        "license": "apache-2.0",
    }


default_cfgs = generate_default_cfgs({f"cifar_resnet{depth}": _cfg() for depth in (8, 20, 32, 44, 56, 110)})


def _create(variant: str, depth: int, pretrained: bool, **kwargs: Any) -> CIFARResNet:
    model: CIFARResNet = build_model_with_cfg(CIFARResNet, variant, pretrained, depth=depth, **kwargs)
    return model


@register_model
def cifar_resnet8(pretrained: bool = False, **kwargs: Any) -> CIFARResNet:
    """8 layers: for quick trials."""
    return _create("cifar_resnet8", 8, pretrained, **kwargs)


@register_model
def cifar_resnet20(pretrained: bool = False, **kwargs: Any) -> CIFARResNet:
    """20 layers."""
    return _create("cifar_resnet20", 20, pretrained, **kwargs)


@register_model
def cifar_resnet32(pretrained: bool = False, **kwargs: Any) -> CIFARResNet:
    """32 layers: the teacher of DeiT-LT on CIFAR."""
    return _create("cifar_resnet32", 32, pretrained, **kwargs)


@register_model
def cifar_resnet44(pretrained: bool = False, **kwargs: Any) -> CIFARResNet:
    """44 layers."""
    return _create("cifar_resnet44", 44, pretrained, **kwargs)


@register_model
def cifar_resnet56(pretrained: bool = False, **kwargs: Any) -> CIFARResNet:
    """56 layers."""
    return _create("cifar_resnet56", 56, pretrained, **kwargs)


@register_model
def cifar_resnet110(pretrained: bool = False, **kwargs: Any) -> CIFARResNet:
    """110 layers."""
    return _create("cifar_resnet110", 110, pretrained, **kwargs)
