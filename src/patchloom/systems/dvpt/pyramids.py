"""DVPT in encoders of several scales, as its published code has it for Swin and SegFormer (arXiv 2307.09787).

Both add what prompts read to the first tokens of every block, and a shared bottleneck beside the MLP. They serve
published checkpoints; `patchloom adapt dvpt` is for single-scale encoders.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn
from torch.nn import functional as F

from patchloom.base.ranges import PositiveInt, checked
from patchloom.encoders import Encoder
from patchloom.encoders.insertion import Insertion, place_of
from patchloom.errors import UsageError
from patchloom.segment.losses import dice_loss, segmentation_loss
from patchloom.systems.dvpt.model import SharedBottleneck, attended


class PyramidPrompts(Insertion):
    """Prompts of its own for every block of every stage, and a bottleneck for every group of blocks of a stage.

    Args:
        stages: The blocks of each stage.
        widths: Width of each stage.
        num_prompts: Prompts of a block, which are also the tokens they write to.
        rank: Width of the bottlenecks.
        share_every: Consecutive blocks of a stage that share one.

    Attributes:
        prompts: (1, M, C) by "stage_block".
        bottlenecks: By "stage_group".

    Raises:
        UsageError: A value outside its range.
    """

    @checked
    def __init__(
        self,
        stages: Sequence[Sequence[Any]],
        widths: Sequence[int],
        num_prompts: PositiveInt,
        rank: PositiveInt,
        share_every: PositiveInt,
    ) -> None:
        super().__init__()
        self.num_prompts, self.share_every = num_prompts, share_every
        self.prompts, self.bottlenecks = nn.ParameterDict(), nn.ModuleDict()
        for stage, (blocks, width) in enumerate(zip(stages, widths, strict=True)):
            for number in range(len(blocks)):
                tokens = trunc_normal_(torch.empty(1, num_prompts, width), std=0.02)
                self.prompts[f"{stage}_{number}"] = nn.Parameter(tokens)
                group = f"{stage}_{number // share_every}"
                if group not in self.bottlenecks:
                    self.bottlenecks[group] = SharedBottleneck(width, rank)

    def blocks(self, encoder: Any) -> list[Any]:
        """Return the blocks of each stage of an encoder."""
        raise NotImplementedError

    def written(self, stage: int, number: int, block_input: Tensor, attention: Tensor) -> Tensor:
        """Return the attention's update with what the prompts read written to its first tokens."""
        raise NotImplementedError

    def attach(self, encoder: Encoder) -> None:
        """Act on an encoder from now on."""
        self._owner, self._place = (encoder,), place_of(encoder)
        for stage, blocks in enumerate(self.blocks(encoder)):
            for number, block in enumerate(blocks):
                tokens: dict[str, Tensor] = {}
                at = (stage, number, tokens)
                self._undo += [
                    block.register_forward_pre_hook(partial(self._enters, tokens)),
                    block.drop_path1.register_forward_pre_hook(partial(self._attended, *at)),
                    block.norm2.register_forward_pre_hook(partial(self._passes, tokens)),
                    block.register_forward_hook(partial(self._leaves, *at)),
                ]
        self._set(encoder, "forward_head", self._forward_head)

    def _enters(self, tokens: dict[str, Tensor], block: Any, args: tuple[Any, ...]) -> None:
        tokens["input"] = args[0]

    def _attended(self, stage: int, number: int, tokens: dict[str, Tensor], module: Any, args: tuple[Any, ...]) -> Any:
        return (self.written(stage, number, tokens.pop("input"), args[0]),)

    def _passes(self, tokens: dict[str, Tensor], norm: Any, args: tuple[Any, ...]) -> None:
        tokens["residual"] = args[0]

    def _leaves(
        self, stage: int, number: int, tokens: dict[str, Tensor], block: Any, args: tuple[Any, ...], output: Tensor
    ) -> Tensor:
        added = self.bottlenecks[f"{stage}_{number // self.share_every}"](tokens.pop("residual"))
        return output + added.reshape(output.shape)

    def read(self, stage: int, number: int, tokens: Tensor) -> Tensor:
        """Return what the prompts of a block read from tokens (B, N, C), on the first of N places.

        Raises:
            UsageError: Fewer tokens than prompts.
        """
        if tokens.shape[1] < self.num_prompts:
            raise UsageError(
                f"stage {stage + 1} has {tokens.shape[1]} tokens, fewer than the {self.num_prompts} prompts write to; "
                f"give larger images"
            )
        queries = self.prompts[f"{stage}_{number}"].expand(len(tokens), -1, -1)
        read = attended(queries, tokens)
        return F.pad(read, (0, 0, 0, tokens.shape[1] - self.num_prompts))


class DVPTSwin(PyramidPrompts):
    """DVPT in a Swin Transformer: what prompts read from the attention's update is added to its first tokens.

    There is no gate on it, so the encoder's output changes from the start, as published.

    Args:
        encoder: A timm `SwinTransformer`.
        num_prompts: Prompts of a block; paper: 10.
        rank: Width of the bottlenecks; paper: 10.
        share_every: Consecutive blocks of a stage that share one; paper: 3.
        num_classes: Outputs of the classifier, which has no bias; None: none.
    """

    def __init__(
        self,
        encoder: Encoder,
        num_prompts: int = 10,
        rank: int = 10,
        share_every: int = 3,
        num_classes: int | None = None,
    ) -> None:
        blocks = self.blocks(encoder)
        super().__init__(blocks, [stage[0].dim for stage in blocks], num_prompts, rank, share_every)
        if num_classes is not None:
            self.head = nn.Linear(encoder.num_features, num_classes, bias=False)

    @classmethod
    def check(cls, encoder: Encoder) -> None:
        """Refuse anything but a Swin Transformer.

        Raises:
            UsageError: It is another module.
        """
        from timm.models.swin_transformer import SwinTransformer

        if not isinstance(encoder, SwinTransformer):
            raise UsageError(f"DVPTSwin is for timm's SwinTransformer, not for a {type(encoder).__name__}")

    def blocks(self, encoder: Any) -> list[Any]:
        """Return the blocks of each stage."""
        return [list(stage.blocks) for stage in encoder.layers]

    def written(self, stage: int, number: int, block_input: Tensor, attention: Tensor) -> Tensor:
        """Return h + E, where the prompts read E from h, the attention's update (B, H, W, C)."""
        tokens = attention.flatten(1, 2)
        return attention + self.read(stage, number, tokens).reshape(attention.shape)


class SegFormerPrompts(PyramidPrompts):
    """DVPT in the Mix Transformer of a SegFormer: what prompts read from the stream is added to it through a gate.

    Args:
        encoder: A timm `PyramidVisionTransformerV2`, whose blocks are a Mix Transformer's.
        num_prompts: Prompts of a block; paper: 10.
        rank: Width of the bottlenecks; paper: 10.
        share_every: Consecutive blocks of a stage that share one; paper: 2.

    Attributes:
        gates: (1,) by "stage_block", 0 at first.
    """

    def __init__(self, encoder: Encoder, num_prompts: int = 10, rank: int = 10, share_every: int = 2) -> None:
        blocks = self.blocks(encoder)
        widths = [stage[0].norm1.weight.numel() for stage in blocks]
        super().__init__(blocks, widths, num_prompts, rank, share_every)
        self.gates = nn.ParameterDict({name: nn.Parameter(torch.zeros(1)) for name in self.prompts})

    @classmethod
    def check(cls, encoder: Encoder) -> None:
        """Refuse anything but a pyramid of Mix Transformer blocks.

        Raises:
            UsageError: It is another module.
        """
        from timm.models.pvt_v2 import PyramidVisionTransformerV2

        if not isinstance(encoder, PyramidVisionTransformerV2):
            raise UsageError(f"SegFormerPrompts is for timm's PyramidVisionTransformerV2, not {type(encoder).__name__}")

    def blocks(self, encoder: Any) -> list[Any]:
        """Return the blocks of each stage."""
        return [list(stage.blocks) for stage in encoder.stages]

    def written(self, stage: int, number: int, block_input: Tensor, attention: Tensor) -> Tensor:
        """Return a + g E, where the prompts read E from the stream x + a (B, N, C)."""
        read = self.read(stage, number, block_input + attention)
        return attention + self.gates[f"{stage}_{number}"] * read


class AdaptedProjection(nn.Module):
    """A frozen linear projection with a bottleneck beside it.

    Args:
        in_width: Width of the input.
        out_width: Width of the output.
        rank: Width of the bottleneck.
    """

    def __init__(self, in_width: int, out_width: int, rank: int) -> None:
        super().__init__()
        self.proj = nn.Linear(in_width, out_width).requires_grad_(False)
        self.bottleneck = SharedBottleneck(in_width, rank, out_width)

    def forward(self, x: Tensor) -> Tensor:
        """Return (…, out) for (…, in)."""
        projected: Tensor = self.proj(x) + self.bottleneck(x)
        return projected


class DVPTSegFormer(nn.Module):
    """SegFormer with DVPT in its encoder and its decoder's projections.

    Args:
        encoder: A timm `PyramidVisionTransformerV2` of four stages.
        num_classes: Classes of a pixel.
        decoder_width: Width all four scales are projected to; paper: 768.
        num_prompts: Prompts of a block.
        rank: Width of the bottlenecks.
        share_every: Consecutive blocks of a stage that share one.
    """

    def __init__(
        self,
        encoder: Encoder,
        num_classes: int,
        decoder_width: int = 768,
        num_prompts: int = 10,
        rank: int = 10,
        share_every: int = 2,
    ) -> None:
        super().__init__()
        from patchloom.encoders.insertion import insert

        self.encoder = encoder
        prompts = SegFormerPrompts(encoder, num_prompts, rank, share_every)
        widths = [stage[0].norm1.weight.numel() for stage in prompts.blocks(encoder)]
        insert(encoder, prompts, "adapter")
        self.projections = nn.ModuleList(AdaptedProjection(width, decoder_width, rank) for width in widths)
        self.classifier = nn.Conv2d(len(widths) * decoder_width, num_classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, classes, H, W) of images (B, 3, H, W), sides divisible by 32."""
        x = self.encoder.patch_embed(images)
        maps = []
        stages: Any = self.encoder.stages
        for stage in stages:
            x = stage(x)
            maps.append(x)
        size = maps[0].shape[-2:]
        projected = []
        for features, projection in zip(maps, self.projections, strict=True):
            tokens = projection(features.flatten(2).transpose(1, 2)).transpose(1, 2)
            projected.append(
                F.interpolate(tokens.unflatten(2, features.shape[-2:]), size, mode="bilinear", align_corners=False)
            )
        logits = self.classifier(torch.cat(projected[::-1], dim=1))  # the coarsest comes first
        return F.interpolate(logits, scale_factor=4, mode="bilinear", align_corners=False)


def dvpt_segmentation_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Return what DVPT's segmentation models are trained with: half cross-entropy, half Dice.

    Dice with squared denominators over the whole batch, of probabilities after one softmax: the published script takes
    a softmax of what is one already.

    Args:
        logits: (B, K, h, w), resized to the mask.
        target: (B, H, W) int64; 255 where unknown.
    """
    dice = dice_loss(logits, target, squared_pred=True, batch=True)
    return 0.5 * segmentation_loss(logits, target) + 0.5 * dice
