"""UNETR: a U-Net on the blocks of a ViT of volumes, for patches of any size (extra: medical).

Hatamizadeh et al. 2022 (WACV 2022, arXiv 2103.10504); the last step to full size, by interpolation, is Hi-End-MAE's
(arXiv 2502.08347), whose patches have 12 voxels. The convolutional blocks are MONAI's, under the names they have there.

>>> import torch
>>> from patchloom.encoders import create_encoder
>>> encoder = create_encoder("volume_vit_micro_patch4_32", image_size=16, in_chans=1)
>>> UNETR(encoder, num_classes=3, feature_size=4)(torch.rand(1, 1, 16, 16, 16)).shape
torch.Size([1, 3, 16, 16, 16])
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from patchloom.encoders import (
    Encoder,
    create_encoder,
    depth,
    embed_dim,
    grid_size,
    in_chans,
    input_size,
    intermediate_layers,
    kind_of,
    patch_shape,
    sides_of,
)
from patchloom.encoders.patches import Grid, shown
from patchloom.encoders.volume import VolumeTransformer, in_slices, turn_kernels
from patchloom.errors import MissingExtraError, UsageError
from patchloom.segment.backbone import Backbone
from patchloom.segment.build import Parts

SKIPS = (3, 6, 9)
"""Blocks, from 0, whose outputs are the skip connections: the published ones, of 12."""
STOCK = (16, 16, 16)
PUBLISHED_SPACING = (1.5, 1.5, 1.5)
OF_SEGMENTATION = {"positions": "learned", "norm_eps": 1e-5}
"""What the encoder of the published network has otherwise than in pre-training, besides no class token."""


class VolumeBackbone(nn.Module):
    """A volume, the maps of three blocks of its encoder, and the map behind the final norm.

    Args:
        encoder: Encoder of volumes.
        layers: The three blocks, from 0, shallow ones first; negative ones from the end.
        frozen: The encoder's weights stay as they are.

    Raises:
        UsageError: An encoder of other inputs, or layers it has not.
    """

    apply_norm = False

    def __init__(self, encoder: Encoder, layers: Sequence[int] = SKIPS, frozen: bool = False) -> None:
        super().__init__()
        if kind_of(encoder) != "volume":
            raise UsageError(f"UNETR is for encoders of volumes, and this one takes {kind_of(encoder)}s")
        count = depth(encoder)
        if len(layers) != 3 or any(not -count <= layer < count for layer in layers):
            raise UsageError(
                f"UNETR takes the maps of three blocks of the encoder's {count}, from 0, and was given "
                f"{', '.join(map(str, layers))}; name three by layers"
            )
        self.encoder, self.layers, self.frozen = encoder, tuple(layer % count for layer in layers), frozen
        if frozen:
            encoder.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> VolumeBackbone:
        """Set the mode; a frozen encoder stays in eval mode."""
        super().train(mode)
        if self.frozen:
            self.encoder.eval()
        return self

    def forward(self, volumes: Tensor) -> list[Tensor]:
        """Return the volumes (B, C, D, H, W), three maps (B, E, d, h, w) that are not normed, and one that is."""
        grid, last = grid_size(self.encoder, sides_of(volumes)), depth(self.encoder) - 1
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            tokens = intermediate_layers(self.encoder, volumes, [*self.layers, last], norm=False)
            maps = [found.patches for found in tokens]
            maps[-1] = self.encoder.norm(maps[-1])
        return [volumes, *(x.transpose(1, 2).unflatten(2, grid) for x in maps)]


class UNETRHead(nn.Module):
    """Maps of a ViT and the volume itself to logits of every voxel.

    Args:
        in_chans: Channels of the volume.
        width: Width E of the maps.
        num_classes: K.
        feature_size: Channels at full size; twice as many with each halving.
        stock_upsampling: Double the size in the last step too, by a transposed convolution, as the original does:
            for patches of 16 voxels.

    Raises:
        MissingExtraError: MONAI is not installed.
    """

    def __init__(
        self, in_chans: int, width: int, num_classes: int, feature_size: int = 32, stock_upsampling: bool = False
    ) -> None:
        super().__init__()
        blocks = import_blocks()
        f: int = feature_size
        common: dict[str, Any] = {"spatial_dims": 3, "kernel_size": 3, "norm_name": "instance", "res_block": True}

        def lifted(out: int, steps: int) -> nn.Module:
            made: nn.Module = blocks.UnetrPrUpBlock(
                in_channels=width,
                out_channels=out,
                num_layer=steps,
                stride=1,
                upsample_kernel_size=2,
                conv_block=True,
                **common,
            )
            return made

        def joined(inner: int, out: int) -> nn.Module:
            made: nn.Module = blocks.UnetrUpBlock(in_channels=inner, out_channels=out, upsample_kernel_size=2, **common)
            return made

        self.encoder1 = blocks.UnetrBasicBlock(in_channels=in_chans, out_channels=f, stride=1, **common)
        self.encoder2, self.encoder3, self.encoder4 = lifted(2 * f, 2), lifted(4 * f, 1), lifted(8 * f, 0)
        self.decoder5, self.decoder4, self.decoder3 = joined(width, 8 * f), joined(8 * f, 4 * f), joined(4 * f, 2 * f)
        self.decoder2 = joined(2 * f, f) if stock_upsampling else FullSizeBlock(2 * f, f)
        self.num_classes, self.feature_size = num_classes, f
        self.out = blocks.UnetOutBlock(spatial_dims=3, in_channels=f, out_channels=num_classes)
        self.grad_checkpointing = False

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Return logits (B, K, D, H, W) of what `VolumeBackbone` returns."""
        volumes, third, sixth, ninth, last = maps
        x = self.decoder5(last, self.encoder4(ninth))
        x = self.decoder4(x, self.encoder3(sixth))
        x = self._run(self.decoder3, x, self._run(self.encoder2, third))
        x = self._run(self.decoder2, x, self._run(self.encoder1, volumes))
        logits: Tensor = self.out(x)
        return logits

    def _run(self, block: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """Return what a block makes of its inputs; of large maps it may be computed once more instead of kept."""
        if self.grad_checkpointing and torch.is_grad_enabled():
            again: Tensor = checkpoint(block, *inputs, use_reentrant=False)
            return again
        return block(*inputs)


class FullSizeBlock(nn.Module):
    """Interpolation to the size of the skip connection, a convolution, and a residual block on both.

    Args:
        in_channels: Channels in.
        out_channels: Channels out, and of the skip connection.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv3d = nn.Conv3d(in_channels, out_channels, kernel_size=3, padding=1)
        self.conv_block = import_blocks().UnetResBlock(
            3, 2 * out_channels, out_channels, kernel_size=3, stride=1, norm_name="instance"
        )

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """Return (B, out, D, H, W) of x (B, in, d, h, w) and a skip connection (B, out, D, H, W)."""
        x = F.interpolate(x, size=skip.shape[2:], mode="trilinear", align_corners=False)
        out: Tensor = self.conv_block(torch.cat((self.conv3d(x), skip), dim=1))
        return out


class UNETR(nn.Module):
    """An encoder of volumes with a fresh UNETR decoder.

    Args:
        encoder: Encoder of volumes; the published one has no class token, learnt positions and an epsilon of 1e-5.
        num_classes: K.
        feature_size: Channels at full size; paper: 32.
        layers: Blocks whose maps are the skip connections.
        stock_upsampling: See `UNETRHead`.
        frozen: The encoder's weights stay as they are.

    Raises:
        UsageError: An encoder of other inputs, layers it has not, or patches that stock upsampling does not fit.
        MissingExtraError: MONAI is not installed.
    """

    def __init__(
        self,
        encoder: Encoder,
        num_classes: int,
        feature_size: int = 32,
        layers: Sequence[int] = SKIPS,
        stock_upsampling: bool = False,
        frozen: bool = False,
    ) -> None:
        super().__init__()
        self.backbone = VolumeBackbone(encoder, layers, frozen)
        patch = patch_shape(encoder)
        if stock_upsampling and patch != STOCK:
            raise UsageError(f"stock_upsampling is for patches of 16 voxels, and the encoder's have {shown(patch)}")
        self.head = UNETRHead(in_chans(encoder), embed_dim(encoder), num_classes, feature_size, stock_upsampling)

    def forward(self, volumes: Tensor) -> Tensor:
        """Return logits (B, K, D, H, W) of normalised volumes (B, C, D, H, W)."""
        logits: Tensor = self.head(self.backbone(volumes))
        return logits

    def for_scans(self) -> Any:
        """Return the network of a published checkpoint for volumes as they lie here (`encoders.volume.in_slices`).

        Classes have numbers for names; windows overlap by half, of the spacing the published networks work at.
        """
        from patchloom.data.segmentation import colours
        from patchloom.segment.volume_saved import VolumeSegmenter

        backbone, head = self.backbone, copy.deepcopy(self.head)
        turned = cast(Encoder, in_slices(cast(VolumeTransformer, backbone.encoder)))
        turn_kernels(head)
        parts = Parts(cast(Backbone, VolumeBackbone(turned, backbone.layers, frozen=True)), None, head, None)
        names = [str(number) for number in range(head.num_classes)]
        palette = [(0, 0, 0), *colours(len(names))][: len(names)]
        settings = {"stock_upsampling": not isinstance(head.decoder2, FullSizeBlock)}
        how = (input_size(turned), 0.5, PUBLISHED_SPACING)
        return VolumeSegmenter(parts, "unetr", head.feature_size, *how, None, palette, names, settings).eval()


def build(
    encoder: Encoder,
    num_classes: int,
    *,
    layers: Sequence[int] | None = None,
    width: int = 32,
    frozen: bool = False,
    stock_upsampling: bool = False,
) -> Parts:
    """Return an encoder with a fresh decoder as the parts of a segmentation model; `width` is the feature size.

    Raises:
        UsageError, MissingExtraError: As `UNETR`.
    """
    made = UNETR(encoder, num_classes, width, layers or SKIPS, stock_upsampling, frozen)
    return Parts(cast(Backbone, made.backbone), None, made.head, None)


def as_unetr_encoder(encoder: Encoder) -> Encoder:
    """Return the encoder of a segmentation network with a pre-trained one's weights, as published.

    It has no class token, its positions train, and the epsilon of its norms is 1e-5; names and sizes stay.

    Args:
        encoder: A `VolumeTransformer`; others are returned as they are.
    """
    if not isinstance(encoder, VolumeTransformer):
        return encoder
    made = encoder.patchloom_args
    arguments = {
        name: value
        for name, value in made["model_args"].items()
        if name not in ("img_size", "num_slices", "in_chans", "class_token", "global_pool", "num_classes")
    }
    new = create_encoder(
        made["architecture"],
        image_size=input_size(encoder),
        in_chans=in_chans(encoder),
        **{**arguments, "class_token": False, "global_pool": "avg", "fc_norm": False, **OF_SEGMENTATION},
    )
    state = {name: value for name, value in encoder.state_dict().items() if name in new.state_dict()}
    nn.Module.load_state_dict(new, state)
    new.pretrained_cfg = encoder.pretrained_cfg
    return new


def skip_layers(count: int) -> Grid:
    """Return the blocks whose maps are the skip connections, of an encoder of so many: 3, 6 and 9 of 12.

    >>> skip_layers(12), skip_layers(4)
    ((3, 6, 9), (1, 2, 3))
    """
    return tuple(min(count - 1, round(layer * count / 12)) for layer in SKIPS)


def import_blocks() -> Any:
    """Return MONAI's blocks.

    Raises:
        MissingExtraError: It is not installed.
    """
    try:
        from types import SimpleNamespace

        from monai.networks.blocks.dynunet_block import UnetOutBlock, UnetResBlock
        from monai.networks.blocks.unetr_block import UnetrBasicBlock, UnetrPrUpBlock, UnetrUpBlock
    except ImportError as error:
        raise MissingExtraError("monai", "medical", "UNETR") from error
    return SimpleNamespace(
        UnetOutBlock=UnetOutBlock,
        UnetResBlock=UnetResBlock,
        UnetrBasicBlock=UnetrBasicBlock,
        UnetrPrUpBlock=UnetrPrUpBlock,
        UnetrUpBlock=UnetrUpBlock,
    )
