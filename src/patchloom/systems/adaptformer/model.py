"""AdaptFormer: a narrow two-layer branch beside the MLP of every block of a frozen encoder.

"AdaptFormer: Adapting Vision Transformers for Scalable Visual Recognition", NeurIPS 2022, arXiv 2205.13535.
Where the paper's figure and its published code differ (the adapter reads what enters the norm), the code is followed.

>>> import timm, torch
>>> from patchloom.encoders.insertion import insert
>>> encoder = timm.create_model("vit_tiny_patch16_224", num_classes=0).eval()
>>> adapter = AdaptFormer(encoder, num_classes=5)
>>> images = torch.randn(2, 3, 224, 224)
>>> plain = encoder(images)
>>> insert(encoder, adapter)
>>> encoder(images).shape, torch.equal(encoder.forward_head(encoder.forward_features(images), pre_logits=True), plain)
(torch.Size([2, 5]), True)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn
from torch.nn import functional as F

from patchloom.base.ranges import Fraction, PositiveInt, checked
from patchloom.encoders import Encoder, depth, embed_dim
from patchloom.encoders.heads import Pool
from patchloom.encoders.insertion import Insertion
from patchloom.encoders.readout import Readout
from patchloom.errors import UsageError, unknown_name
from patchloom.systems.adaptformer.config import Init, Input, Norm, Placement


class BottleneckAdapter(nn.Module):
    """Down, ReLU, dropout, up, times a scale: (…, D) -> (…, D).

    Args:
        dim: Width D.
        bottleneck: Width m in the middle, at least 1.
        scale: Factor on the output, or `learnable`: a parameter that starts at 1.
        dropout: Dropout in the middle, in training.
        norm: `in`: a layer norm (eps 1e-5) before `down`; `out`: one after the scale; `none`.
        init: `zero`: the output is 0 at first (paper's code, "lora"); `trunc_normal`: both matrices are drawn with
            standard deviation 0.02, which is what the published video runs start from.

    Raises:
        UsageError: A value outside its range or an unknown option.
    """

    @checked
    def __init__(
        self,
        dim: int,
        bottleneck: PositiveInt = 64,
        scale: float | Literal["learnable"] = 0.1,
        dropout: Fraction = 0.1,
        norm: Norm = "none",
        init: Init = "zero",
    ) -> None:
        super().__init__()
        if isinstance(scale, str) and scale != "learnable":
            raise UsageError(f"scale is {scale!r}; give a number or learnable")
        self.down_proj = nn.Linear(dim, bottleneck)
        self.up_proj = nn.Linear(bottleneck, dim)
        self.place = norm
        self.norm = None if norm == "none" else nn.LayerNorm(dim)
        self.scale = nn.Parameter(torch.ones(1)) if scale == "learnable" else float(scale)
        self.dropout = dropout
        self.reset_parameters(init)

    def reset_parameters(self, init: Init = "zero") -> None:
        """Draw the initial weights."""
        if init == "zero":
            nn.init.kaiming_uniform_(self.down_proj.weight, a=math.sqrt(5))
            nn.init.zeros_(self.up_proj.weight)
        else:
            trunc_normal_(self.down_proj.weight, std=0.02)
            trunc_normal_(self.up_proj.weight, std=0.02)
        nn.init.zeros_(self.down_proj.bias)
        nn.init.zeros_(self.up_proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return the branch's output, without adding its input."""
        if self.norm is not None and self.place == "in":
            x = self.norm(x)
        hidden = F.relu(self.down_proj(x), inplace=True)
        if self.dropout and self.training:
            hidden = F.dropout(hidden, self.dropout)
        # The scale is applied where the tensor is narrow: s·(W h + b) = W (s·h) + s·b.
        out = F.linear(hidden * self.scale, self.up_proj.weight, self.up_proj.bias * self.scale)
        if self.norm is not None and self.place == "out":
            out = self.norm(out)
        return out


class AdaptFormer(Readout, Insertion):
    """Bottleneck adapters in the blocks of a frozen encoder.

    Parallel: with x1 the residual stream after attention, the block gives x1 + mlp(norm2(x1)) + adapter(x1); the
    adapter reads x1 before norm2, as the published code does. Sequential: x1 + f + adapter(f), f the MLP's update.

    Args:
        encoder: What it is made for.
        bottleneck: Width of the branch.
        scale: Factor on it, or `learnable`.
        dropout: Dropout in the branch.
        placement: `parallel` or `sequential`.
        input: What a parallel branch reads: `residual` (published code) or `normed` (the paper's figure 3).
        norm: Layer norm of the branch: `none`, `in` or `out`.
        init: Initial weights, see `BottleneckAdapter`.
        blocks: Numbers of the blocks that get one; None: all.
        num_classes: Outputs of the classifier; None: none.
        pool: What the classifier reads, see `heads.pool_replacements`.
        train_pool_norm: Train the norm behind mean pooling, where there is one.
        own_pool_norm: Train a copy of the encoder's norm behind mean pooling in its place.

    Raises:
        UsageError: An unknown option, or blocks the encoder does not have.
    """

    kind = "adaptformer"
    needs_mlp_branch = True

    def __init__(
        self,
        encoder: Encoder,
        bottleneck: int = 64,
        scale: float | Literal["learnable"] = 0.1,
        dropout: float = 0.1,
        placement: Placement = "parallel",
        input: Input = "residual",
        norm: Norm = "none",
        init: Init = "zero",
        blocks: Sequence[int] | None = None,
        num_classes: int | None = None,
        pool: Pool = "auto",
        train_pool_norm: bool = True,
        own_pool_norm: bool = False,
    ) -> None:
        super().__init__()
        for kind, value, known in (("placement", placement, Placement), ("input", input, Input)):
            if value not in get_args(known):
                raise unknown_name(f"adapter {kind}", str(value), get_args(known))
        self.arguments = {
            "bottleneck": bottleneck,
            "scale": scale,
            "dropout": dropout,
            "placement": placement,
            "input": input,
            "norm": norm,
            "init": init,
            "blocks": None if blocks is None else list(blocks),
            "num_classes": num_classes,
            "pool": pool,
            "train_pool_norm": train_pool_norm,
            "own_pool_norm": own_pool_norm,
        }
        chosen = chosen_blocks(encoder, blocks)
        if placement == "parallel":
            self.branches = chosen
        else:
            self.updates = chosen
        self.branch_input = input
        width = embed_dim(encoder)
        self.adapters = nn.ModuleDict(
            {str(number): BottleneckAdapter(width, bottleneck, scale, dropout, norm, init) for number in chosen}
        )
        self.make_readout(encoder, num_classes, pool, train_pool_norm, own_pool_norm)

    def branch(self, number: int, x: Tensor) -> Tensor:
        """Return what a parallel adapter adds to the block's output."""
        added: Tensor = self.adapters[str(number)](x)
        return added

    def update(self, number: int, f: Tensor) -> Tensor:
        """Return the MLP's update with what a sequential adapter makes of it."""
        return f + self.adapters[str(number)](f)


def chosen_blocks(encoder: Encoder, blocks: Sequence[int] | None) -> list[int]:
    """Return the numbers of the blocks meant, counted from 0.

    Raises:
        UsageError: None at all, or one that the encoder does not have.
    """
    count = depth(encoder)
    if blocks is None:
        return list(range(count))
    chosen = sorted({block % count if -count <= block < count else block for block in blocks})
    if not chosen:
        raise UsageError("blocks is empty, so nothing would be trained but the head; use adapt linear for that")
    if wrong := [block for block in chosen if not 0 <= block < count]:
        raise UsageError(f"there is no block {wrong[0]}; the encoder has blocks 0 to {count - 1}")
    return chosen
