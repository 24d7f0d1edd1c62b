"""Specific distillation: a classifier with a token of its own for what the teacher says.

The second stage of G2SD (Huang et al. 2023, arXiv 2302.14771). Specification `g2sd`, section 2.3.

>>> from patchloom.encoders import create_encoder
>>> model = DistilledVisionTransformer(create_encoder("vit_tiny_patch16_224"), num_classes=10)
>>> labels, teacher = model.train()(torch.randn(2, 3, 224, 224))
>>> labels.shape, teacher.shape, model.eval()(torch.randn(2, 3, 224, 224)).shape
(torch.Size([2, 10]), torch.Size([2, 10]), torch.Size([2, 10]))
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn

from patchloom.distill.logits import hard_distillation_loss, nkd_loss
from patchloom.encoders import Encoder, embed, embed_dim, num_prefix_tokens, run_blocks
from patchloom.errors import UsageError


class DistilledVisionTransformer(nn.Module):
    """An encoder with a distillation token, put last and without a position, and a classifier for each of two tokens.

    timm's distilled models put that token second and give it a position; theirs is another layout.

    Args:
        encoder: Encoder without head; its positions may be absolute or rotary (a relative table has no row for a token
            put last).
        num_classes: Outputs of each classifier.
        eval_head: What eval mode returns: the mean of both (paper), the class token's or the distillation token's.
        pool: The labels' classifier reads the class token (paper), or the mean over patches.

    Raises:
        UsageError: An unknown head, or an encoder without class token where one is read.
    """

    def __init__(
        self,
        encoder: Encoder,
        num_classes: int,
        eval_head: Literal["mean", "cls", "dist"] = "mean",
        pool: Literal["cls", "avg"] = "cls",
    ) -> None:
        super().__init__()
        if eval_head not in ("mean", "cls", "dist"):
            raise UsageError(f"unknown eval_head {eval_head!r}; use mean, cls or dist")
        if pool == "cls" and not num_prefix_tokens(encoder):
            raise UsageError("this encoder has no class token; set pool to avg")
        if getattr(encoder, "rel_pos_bias", None) is not None:
            raise UsageError("relative positions have no place for a token put last; choose an encoder without")
        self.encoder = encoder
        self.eval_head, self.pool = eval_head, pool
        self.dist_token = nn.Parameter(torch.zeros(1, 1, embed_dim(encoder)))
        self.head = nn.Linear(embed_dim(encoder), num_classes)
        self.head_dist = nn.Linear(embed_dim(encoder), num_classes)
        trunc_normal_(self.dist_token, std=0.02)
        for head in (self.head, self.head_dist):
            trunc_normal_(head.weight, std=2e-5)
            nn.init.zeros_(head.bias)

    def features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the two classifiers read, (B, D) each, for (B, C, H, W) normalised images."""
        embedded = embed(self.encoder, images)
        tokens = torch.cat([embedded.x, self.dist_token.expand(len(images), -1, -1)], dim=1)
        last, _ = run_blocks(self.encoder, replace(embedded, x=tokens))
        x = self.encoder.norm(last)
        prefix = num_prefix_tokens(self.encoder)
        return x[:, 0] if self.pool == "cls" else x[:, prefix:-1].mean(1), x[:, -1]

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Return both heads' logits while training; what `eval_head` says in eval mode."""
        label, distilled = self.features(images)
        logits, taught = self.head(label), self.head_dist(distilled)
        if self.training:
            return logits, taught
        return {"mean": (logits + taught) / 2, "cls": logits, "dist": taught}[self.eval_head]


def specific_loss(
    logits: Tensor, taught: Tensor, labels: Tensor, teacher: Tensor, kind: Literal["hard", "nkd"] = "hard"
) -> Tensor:
    """Return the loss of the second stage.

    Args:
        logits: (B, C), of the labels' head.
        taught: (B, C), of the distillation head.
        labels: (B, C) mixed, smoothed labels.
        teacher: (B, C) logits of the fine-tuned teacher on the same images.
        kind: `hard`: half the soft cross-entropy with the labels, half the cross-entropy with the teacher's first
            choice; `nkd`: normalised distillation on the labels' head alone.
    """
    if kind == "nkd":
        return nkd_loss(logits, teacher, labels)
    base = torch.sum(-labels * logits.float().log_softmax(-1), dim=-1).mean()
    return 0.5 * base + 0.5 * hard_distillation_loss(taught, teacher)
