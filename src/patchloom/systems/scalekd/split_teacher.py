"""A teacher cut in two: what it makes of an image, and its last part as a frozen function of tokens.

Any `VisionTransformer`, `Beit`, `Eva` or Swin of timm, for ScaleKD (Fan et al. 2024, arXiv 2411.06786).

>>> import timm, torch
>>> teacher = Teacher(timm.create_model("vit_tiny_patch16_224", num_classes=10))
>>> seen = teacher(torch.randn(2, 3, 224, 224))
>>> seen.features.shape, seen.logits.shape
(torch.Size([2, 192, 14, 14]), torch.Size([2, 10]))
>>> torch.allclose(teacher.tail(seen.tokens, seen), seen.features.flatten(2).transpose(1, 2), atol=1e-5)
True
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from timm.layers import DropPath
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn

from patchloom.encoders import Embedded, depth, embed, grid_size, has_tokens, num_prefix_tokens, run_blocks, sides_of
from patchloom.errors import UsageError


@dataclass(frozen=True)
class TeacherOutput:
    """What a teacher makes of a batch."""

    features: Tensor
    """(B, Ct, h, w): the last map, after the final norm."""
    tokens: Tensor
    """(B, n, Ct3): what enters the tail, row-major."""
    logits: Tensor | None
    """(B, C), where the teacher has a classifier."""
    prefix: Tensor | None = None
    """(B, P, Ct3): class and register tokens that enter the tail beside the patches; none for Swin."""
    embedded: Embedded | None = None
    """Positions for the tail's blocks; none for Swin."""


class Teacher(nn.Module):
    """A frozen teacher. It stays in eval mode whatever is asked of it: its answers must not be noisy.

    Args:
        model: A timm model with or without classifier.
        tail_blocks: Blocks of a plain ViT that make the tail; default: a twelfth of the depth, at least one. Swin's
            tail is its last stage.
        drop_path: Keep stochastic depth at work, as the published training did by accident.

    Raises:
        UsageError: A model of another kind, or a tail as long as the model.
    """

    def __init__(self, model: Any, tail_blocks: int | None = None, drop_path: bool = False) -> None:
        super().__init__()
        if not (has_tokens(model) or isinstance(model, SwinTransformer)):
            raise UsageError(f"a {type(model).__name__} cannot be this teacher; use a ViT, BEiT, EVA or Swin of timm")
        if any(getattr(block, "carried_tokens", 0) for block in getattr(model, "blocks", ())):
            raise UsageError("this teacher's adapter carries prompts from block to block, which its tail cannot")
        self.model: Any = model.requires_grad_(False).eval()
        self.drop_path = drop_path
        self.is_swin = isinstance(model, SwinTransformer)
        blocks = 0 if self.is_swin else depth(model)
        self.tail_blocks = max(1, round(blocks / 12)) if tail_blocks is None else tail_blocks
        if not self.is_swin and not 1 <= self.tail_blocks < blocks:
            raise UsageError(f"tpp_blocks is {self.tail_blocks}; it must be 1 to {blocks - 1} for this teacher")

    def train(self, mode: bool = True) -> Teacher:
        """Stay in eval mode, but for drop paths where these are wanted."""
        super().train(False)
        for module in self.modules():
            if isinstance(module, DropPath):
                module.training = mode and self.drop_path
        return self

    @property
    def dims(self) -> tuple[int, int]:
        """Widths of the tokens that enter the tail and of the last map."""
        if self.is_swin:
            return int(self.model.num_features) // 2, int(self.model.num_features)
        return int(self.model.embed_dim), int(self.model.embed_dim)

    def grids(self, size: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return the grid of what enters the tail and of the last map, for images of a size in pixels."""
        if not self.is_swin:
            return grid_size(self.model, size), grid_size(self.model, size)
        stem = self.model.patch_embed.patch_size[0]
        stages = len(self.model.layers)
        fine, coarse = (stem * 2 ** (stages - 2), stem * 2 ** (stages - 1))
        return (size[0] // fine, size[1] // fine), (size[0] // coarse, size[1] // coarse)

    @torch.no_grad()
    def forward(self, images: Tensor) -> TeacherOutput:
        """Return features and answers for (B, C, H, W) normalised images, without gradient."""
        if self.is_swin:
            x = self.model.patch_embed(images)
            for layer in self.model.layers[:-1]:
                x = layer(x)
            last = self.model.norm(self.model.layers[-1](x))
            return TeacherOutput(last.permute(0, 3, 1, 2), x.flatten(1, 2), self._logits(last))
        embedded = embed(self.model, images)
        cut, prefix = depth(self.model) - self.tail_blocks, num_prefix_tokens(self.model)
        entering, _ = run_blocks(self.model, embedded, stop=cut)
        x, _ = run_blocks(self.model, replace(embedded, x=entering), start=cut)
        normed = self._norm(x)
        features = normed[:, prefix:].transpose(1, 2).unflatten(2, grid_size(self.model, sides_of(images)))
        logits = self._logits(self.model.norm(x))
        return TeacherOutput(features, entering[:, prefix:], logits, entering[:, :prefix], embedded)

    def tail(self, tokens: Tensor, output: TeacherOutput) -> Tensor:
        """Return what the teacher's last part makes of tokens; the gradient passes through it to them.

        Args:
            tokens: (B, n, Ct3), in place of the teacher's own.
            output: What the teacher made of the same images: its prefix tokens and positions go along.

        Returns:
            (B, h·w, Ct), after the final norm.
        """
        if self.is_swin:
            side = self.grids_of(tokens.shape[1], output)
            return self.model.norm(self.model.layers[-1](tokens.unflatten(1, side))).flatten(1, 2)
        assert output.prefix is not None
        assert output.embedded is not None
        x = torch.cat([output.prefix, tokens], 1)
        cut = depth(self.model) - self.tail_blocks
        x, _ = run_blocks(self.model, replace(output.embedded, x=x), start=cut)
        return self._norm(x)[:, output.prefix.shape[1] :]

    @staticmethod
    def grids_of(count: int, output: TeacherOutput) -> tuple[int, int]:
        """Return the grid of tokens that enter Swin's tail: twice that of the last map."""
        height, width = output.features.shape[-2] * 2, output.features.shape[-1] * 2
        if height * width != count:
            raise UsageError(f"{count} tokens do not fill the {height}x{width} grid of the teacher's tail")
        return height, width

    def _norm(self, x: Tensor) -> Tensor:
        """Return tokens after the final norm; where the model norms after pooling, that norm serves."""
        from patchloom.encoders import final_norm

        return final_norm(self.model, x)

    def _logits(self, features: Tensor) -> Tensor | None:
        return self.model.forward_head(features) if self.model.num_classes > 0 else None
