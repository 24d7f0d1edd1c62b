"""Visual prompt tuning: learnt tokens in front of a frozen encoder's own, shallow or deep.

"Visual Prompt Tuning", ECCV 2022, arXiv 2203.12119; as the baseline in AdaptFormer's published code has it (arXiv
2205.13535).

>>> import timm, torch
>>> from patchloom.encoders.insertion import insert
>>> encoder = timm.create_model("vit_tiny_patch16_224", num_classes=0).eval()
>>> prompts = VisualPrompts(encoder, num_prompts=4, depth="deep", num_classes=5)
>>> insert(encoder, prompts)
>>> encoder(torch.randn(2, 3, 224, 224)).shape, prompts.prompts.numel()
(torch.Size([2, 5]), 9216)
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from patchloom.base.choices import PromptDepth as Depth
from patchloom.base.ranges import Fraction, PositiveInt, checked
from patchloom.encoders import Encoder, embed_dim
from patchloom.encoders import depth as blocks_of
from patchloom.encoders.heads import Pool
from patchloom.encoders.insertion import Insertion
from patchloom.encoders.readout import Readout
from patchloom.errors import UsageError
from patchloom.systems.adaptformer.model import chosen_blocks


class VisualPrompts(Readout, Insertion):
    """Learnt tokens in front of the class token.

    Deep: every block has its own, whose outputs are dropped after it. Shallow: one set goes through all blocks.

    Args:
        encoder: What it is made for.
        num_prompts: Tokens n, at least 1.
        depth: `deep` or `shallow`.
        dropout: Dropout on the tokens in training.
        num_classes: Outputs of the classifier; None: none.
        pool: What the classifier reads, see `heads.pool_replacements`.
        train_pool_norm: Train the norm behind mean pooling, where there is one.
        blocks: Deep only: numbers of the blocks that have prompts; None: all.
        own_pool_norm: Train a copy of the encoder's norm behind mean pooling in its place.
        batch_norm: Put a batch norm without parameters in front of the classifier.

    Attributes:
        prompts: A set (n, D) for each block that has them, or one when shallow; each Xavier-uniform with PyTorch's rule
            for a (1, n, D) tensor, so within ±√(6 / ((n + 1) D)).

    Raises:
        UsageError: A value outside its range or an unknown depth.
    """

    kind = "vpt"

    @checked
    def __init__(
        self,
        encoder: Encoder,
        num_prompts: PositiveInt = 1,
        depth: Depth = "deep",
        dropout: Fraction = 0.0,
        num_classes: int | None = None,
        pool: Pool = "auto",
        train_pool_norm: bool = True,
        blocks: Sequence[int] | None = None,
        own_pool_norm: bool = False,
        batch_norm: bool = True,
    ) -> None:
        super().__init__()
        self.arguments = {
            "num_prompts": num_prompts,
            "depth": depth,
            "dropout": dropout,
            "num_classes": num_classes,
            "pool": pool,
            "train_pool_norm": train_pool_norm,
            "blocks": None if blocks is None else list(blocks),
            "own_pool_norm": own_pool_norm,
            "batch_norm": batch_norm,
        }
        self.carried = depth == "shallow"
        if self.carried and blocks is not None:
            raise UsageError("blocks are for depth=deep; shallow prompts go through all blocks")
        self.dropout = dropout
        chosen = chosen_blocks(encoder, blocks)
        self.set_of = {number: 0 if self.carried else place for place, number in enumerate(chosen)}
        self.token_counts = [num_prompts if number in self.set_of else 0 for number in range(blocks_of(encoder))]
        sets, width = (1 if self.carried else len(chosen)), embed_dim(encoder)
        bound = math.sqrt(6 / ((num_prompts + 1) * width))
        self.prompts = nn.Parameter(torch.empty(sets, num_prompts, width).uniform_(-bound, bound))
        self.make_readout(encoder, num_classes, pool, train_pool_norm, own_pool_norm, batch_norm)

    def new_tokens(self, number: int, x: Tensor) -> Tensor:
        """Return the prompts in front of block `number`."""
        tokens = self.prompts[self.set_of[number]].expand(len(x), -1, -1)
        return F.dropout(tokens, self.dropout, self.training)
