"""DVPT: prompts that read the image, and one narrow bottleneck shared by neighbouring blocks.

"DVPT: Dynamic Visual Prompt Tuning of Large Pre-trained Models for Medical Image Analysis", Neural Networks 185, 2025,
arXiv 2307.09787. The published code has a module of its own for every kind of encoder; each is followed for its kind.

>>> import timm, torch
>>> from patchloom.encoders.insertion import insert
>>> encoder = timm.create_model("vit_tiny_patch16_224", num_classes=0).eval()
>>> adapter = DVPT(encoder, num_prompts=10, rank=8, num_classes=5)
>>> insert(encoder, adapter)
>>> encoder(torch.randn(2, 3, 224, 224)).shape, len(adapter.bottlenecks)
(torch.Size([2, 5]), 4)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from patchloom.base.ranges import PositiveInt, checked
from patchloom.encoders import Encoder, depth, embed_dim, final_norm, num_prefix_tokens
from patchloom.encoders.insertion import Insertion
from patchloom.systems.dvpt.config import Pool


class SharedBottleneck(nn.Module):
    """Down, quick GELU, up, times a gate that starts at 0: (…, D) -> (…, D).

    Args:
        dim: Width D.
        rank: Width in the middle, at least 1.
        out_dim: Width of the output; default: D.

    Attributes:
        gate: (1,), the factor on the output.

    Raises:
        UsageError: A rank below 1.
    """

    @checked
    def __init__(self, dim: int, rank: PositiveInt = 20, out_dim: int | None = None) -> None:
        super().__init__()
        # PyTorch's own initial weights: with the gate at 0 both would be dead if one of them were 0 as well.
        self.down = nn.Linear(dim, rank)
        self.up = nn.Linear(rank, out_dim or dim)
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """Return the branch's output, without adding its input."""
        hidden = self.down(x)
        added: Tensor = self.gate * self.up(hidden * torch.sigmoid(1.702 * hidden))
        return added


class DVPT(Insertion):
    """Prompts through all blocks, and shared bottlenecks beside their MLPs.

    With x1 the stream after attention, P its prompts and T the rest, a block gives x1 + mlp(norm2(x1)) + B(z), where z
    is x1 with the prompts replaced by softmax(P Tᵀ / √D) T (dynamic: they read the image at hand) or x1 itself (as the
    published code computes it). The classifier reads the mean over prompts and class token.

    Args:
        encoder: What it is made for.
        num_prompts: Prompts M, at least 1.
        rank: Width of the bottlenecks.
        share_every: Consecutive blocks that share one bottleneck, at least 1.
        dynamic: The bottleneck sees what the prompts read, see above.
        pool: What the classifier reads: the mean over `prompts+class`, or the `class` token (what the encoder pools).
        num_classes: Outputs of the classifier, which has no bias; None: none.
        projection: Width of a frozen projection between pooling and classifier, such as CLIP's; None: none.

    Attributes:
        prompts: (1, M, D), drawn from N(0, 1).
        positions: (M, D), drawn from N(0, 1) / √D.
        bottlenecks: One for each group of blocks.

    Raises:
        UsageError: A value outside its range, or an unknown pooling.
    """

    kind = "dvpt"
    needs_mlp_branch = True
    carried = True

    @checked
    def __init__(
        self,
        encoder: Encoder,
        num_prompts: PositiveInt = 50,
        rank: int = 20,
        share_every: PositiveInt = 3,
        dynamic: bool = True,
        pool: Pool = "prompts+class",
        num_classes: int | None = None,
        projection: int | None = None,
    ) -> None:
        super().__init__()
        self.arguments = {
            "num_prompts": num_prompts,
            "rank": rank,
            "share_every": share_every,
            "dynamic": dynamic,
            "pool": pool,
            "num_classes": num_classes,
            "projection": projection,
        }
        blocks, width = depth(encoder), embed_dim(encoder)
        self.num_prompts, self.share_every, self.dynamic, self.pool = num_prompts, share_every, dynamic, pool
        self.token_counts = [num_prompts] * blocks
        self.branches = range(blocks)
        self.prompts = nn.Parameter(torch.randn(1, num_prompts, width))
        self.positions = nn.Parameter(torch.randn(num_prompts, width) * width**-0.5)
        self.bottlenecks = nn.ModuleList(SharedBottleneck(width, rank) for _ in range(-(-blocks // share_every)))
        self.projection = None if projection is None else nn.Linear(width, projection, bias=False)
        if self.projection is not None:
            self.projection.requires_grad_(False)
        if num_classes is not None:
            self.head = nn.Linear(projection or width, num_classes, bias=False)

    def new_tokens(self, number: int, x: Tensor) -> Tensor:
        """Return the prompts as they enter the first block: with their positions, and CLIP's norm if there is one."""
        tokens = self.prompts + self.positions
        norm_pre = getattr(self.encoder, "norm_pre", None)
        if isinstance(norm_pre, nn.Module):
            tokens = norm_pre(tokens)
        return tokens.expand(len(x), -1, -1)

    def branch(self, number: int, x: Tensor) -> Tensor:
        """Return what the bottleneck of the block's group adds."""
        if self.dynamic:
            x = read_by_prompts(x, self.num_prompts)
        added: Tensor = self.bottlenecks[number // self.share_every](x)
        return added

    def features(self, encoder: Encoder, x: Tensor) -> Tensor:
        """Return the mean over normed prompts and class token, or what the encoder pools; then the projection."""
        if self.pool == "class":
            vectors = super().features(encoder, x)
        else:
            assert self.prompt_outputs is not None
            prompts = final_norm(encoder, self.prompt_outputs)
            read = [prompts]
            if num_prefix_tokens(encoder):
                first = x[:, :1]
                read.append(final_norm(encoder, first) if isinstance(encoder.norm, nn.Identity) else first)
            vectors = torch.cat(read, dim=1).mean(1)
        return vectors if self.projection is None else self.projection(vectors)


def read_by_prompts(x: Tensor, count: int) -> Tensor:
    """Return tokens (B, T, D) in which the first `count` are replaced by what they read from the others.

    A prompt reads softmax(p · t / √D) over the other tokens t, without projections or heads.
    """
    prompts, rest = x[:, :count], x[:, count:]
    return torch.cat([attended(prompts, rest), rest], dim=1)


def attended(queries: Tensor, tokens: Tensor) -> Tensor:
    """Return softmax(Q Tᵀ / √D) T for queries (B, M, D) and tokens (B, N, D)."""
    return F.scaled_dot_product_attention(queries, tokens, tokens)
