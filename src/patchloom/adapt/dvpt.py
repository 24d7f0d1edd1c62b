"""DVPT: prompts that read the image, and one narrow bottleneck shared by neighbouring blocks.

"DVPT: Dynamic Visual Prompt Tuning of Large Pre-trained Models for Medical Image Analysis", Neural Networks 185, 2025,
arXiv 2307.09787; specification, section 2.

>>> import timm, torch
>>> from patchloom.adapt.insertion import insert
>>> encoder = timm.create_model("vit_tiny_patch16_224", num_classes=0).eval()
>>> adapter = DVPT(encoder, num_prompts=10, rank=8, num_classes=5)
>>> insert(encoder, adapter)
>>> encoder(torch.randn(2, 3, 224, 224)).shape, len(adapter.bottlenecks)
(torch.Size([2, 5]), 4)
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import v2

from patchloom.adapt.adapter_method import AdapterMethod
from patchloom.adapt.dvpt_config import DVPTConfig, Pool
from patchloom.adapt.insertion import Insertion
from patchloom.data.transforms import seeded_globals
from patchloom.encoders import Encoder, depth, embed_dim, final_norm, normalize, num_prefix_tokens
from patchloom.errors import UsageError, unknown_name
from patchloom.training.method import Transform


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

    def __init__(self, dim: int, rank: int = 20, out_dim: int | None = None) -> None:
        super().__init__()
        if rank < 1:
            raise UsageError(f"rank is {rank}; it must be at least 1")
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

    def __init__(
        self,
        encoder: Encoder,
        num_prompts: int = 50,
        rank: int = 20,
        share_every: int = 3,
        dynamic: bool = True,
        pool: Pool = "prompts+class",
        num_classes: int | None = None,
        projection: int | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("num_prompts", num_prompts), ("share_every", share_every)):
            if value < 1:
                raise UsageError(f"{name} is {value}; it must be at least 1")
        if pool not in get_args(Pool):
            raise unknown_name("pool", str(pool), get_args(Pool))
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


class GradingTransform:
    """The paper's augmentation for fundus photographs: flips, crop, colour, any rotation, a shift.

    Args:
        size: Side of the result, pixels.
    """

    def __init__(self, size: int) -> None:
        self.size = size

    @cached_property
    def _recipe(self) -> Any:
        size = (self.size, self.size)
        return v2.Compose(
            [
                v2.RandomHorizontalFlip(0.5),
                v2.RandomVerticalFlip(0.5),
                v2.RandomResizedCrop(size, scale=(0.87, 1.15), ratio=(0.7, 1.3), antialias=True),
                v2.ColorJitter(0.2, 0.2, 0.1, 0.1),
                v2.RandomRotation(180, interpolation=v2.InterpolationMode.BILINEAR),
                v2.RandomAffine(0, translate=(0.1, 0.1), interpolation=v2.InterpolationMode.BILINEAR),
                v2.Resize(size, antialias=True),
            ]
        )

    def __call__(self, image: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Return {"image": (C, size, size) uint8}."""
        with seeded_globals(generator):
            return {"image": self._recipe(image)}

    def __repr__(self) -> str:
        """Name the transform with its settings."""
        return f"GradingTransform(size={self.size})"


class DVPTMethod(AdapterMethod):
    """DVPT: prompts that read the image, and narrow bottlenecks shared by neighbouring blocks."""

    config_class = DVPTConfig
    config: DVPTConfig

    def make_insertion(self, encoder: Encoder, num_classes: int) -> Insertion:
        """Return prompts, bottlenecks and head."""
        config = self.config
        return DVPT(
            encoder,
            num_prompts=config.num_prompts,
            rank=config.rank,
            share_every=config.share_every,
            dynamic=config.dynamic,
            pool=config.pool,
            num_classes=num_classes,
        )

    def build_encoder(self) -> Encoder:
        """Return the encoder with the insertion in it; its statistics are what images are normalised by, or none."""
        encoder = super().build_encoder()
        if not self.config.normalize:
            encoder.pretrained_cfg = {**encoder.pretrained_cfg, "mean": (0.0,) * 3, "std": (1.0,) * 3}
        return encoder

    def transform(self) -> Transform:
        """Return the paper's augmentation, or random crops and flips."""
        return GradingTransform(self.input_size) if self.config.augment == "grading" else super().transform()

    def training_loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return the loss of a batch, and the gates' mean size: how much the bottlenecks have to say."""
        images = normalize(self.pixels(batch["image"]), self.encoder)
        loss = self.targets.loss(self.encoder(images), batch["label"])
        insertion: Any = self.insertion
        gates = torch.stack([bottleneck.gate.detach().abs() for bottleneck in insertion.bottlenecks])
        return {"loss": loss, "gate": gates.mean()}
