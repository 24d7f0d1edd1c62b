"""Specific distillation: a classifier with a token of its own for what the teacher says.

The second stage of G2SD (Huang et al. 2023, arXiv 2302.14771), as the published code has it.

>>> from patchloom.encoders import create_encoder
>>> model = DistilledVisionTransformer(create_encoder("vit_tiny_patch16_224"), num_classes=10)
>>> labels, teacher = model.train()(torch.randn(2, 3, 224, 224))
>>> labels.shape, teacher.shape, model.eval()(torch.randn(2, 3, 224, 224)).shape
(torch.Size([2, 10]), torch.Size([2, 10]), torch.Size([2, 10]))
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from timm.layers import trunc_normal_
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from patchloom.encoders import (
    Encoder,
    create_encoder,
    depth,
    embed,
    embed_dim,
    has_tokens,
    image_size,
    in_chans,
    num_patches,
    num_prefix_tokens,
    patch_size,
    run_blocks,
)
from patchloom.errors import UsageError
from patchloom.training.distillation import hard_distillation_loss, nkd_loss


class DistilledVisionTransformer(nn.Module):
    """An encoder with a distillation token, put last and without a position, and a classifier for each of two tokens.

    timm's distilled models put that token second and give it a position; `as_timm` makes one that computes the same.

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


def as_timm(model: DistilledVisionTransformer, drop_path: float = 0.0) -> Any:
    """Return the same classifier in timm's distilled layout, so that timm alone opens its bundle.

    timm puts the distillation token second and adds a position to it; attention does not mind the order, and a
    position of zeros changes nothing, so all outputs are equal. `hold_position` keeps it at zero while training.
    timm's eval mode returns the mean of both classifiers. Where another `eval_head` is asked for, its classifier is
    doubled and the other's weights are zeros, which is the same function to the last bit.

    Args:
        model: Its encoder a `VisionTransformer` with a class token and no registers; its `pool` must be `cls`.
        drop_path: Stochastic depth rate of the last block.

    Raises:
        UsageError: Another kind of encoder, or one with parts that timm's distilled layout does not have.
    """
    encoder, classes = model.encoder, model.head.out_features
    require_plain(encoder)
    if model.pool != "cls":
        raise UsageError("timm's distilled layout reads the class token; set pool to cls")
    distilled = _distilled_like(encoder, drop_path)
    distilled.reset_classifier(classes)
    distilled.patchloom_args["model_args"]["num_classes"] = classes
    distilled.pretrained_cfg = {**encoder.pretrained_cfg, "classifier": ("head", "head_dist")}
    state = {n: v for n, v in encoder.state_dict().items() if not n.startswith(("head.", "pos_embed"))}
    state["pos_embed"], distilled.without_position = _with_free_token(encoder)
    state["dist_token"] = model.dist_token.detach()
    scale = {"mean": (1.0, 1.0), "cls": (2.0, 0.0), "dist": (0.0, 2.0)}[model.eval_head]
    for name, head, factor in zip(("head", "head_dist"), (model.head, model.head_dist), scale, strict=True):
        state |= {f"{name}.{part}": factor * value for part, value in head.state_dict().items()}
    state_dict = distilled.state_dict()
    wrong = sorted(
        {*state_dict} ^ {*state} | {n for n in state_dict if n in state and state_dict[n].shape != state[n].shape}
    )
    if wrong:
        raise UsageError(
            f"this student has parts that timm's distilled layout does not have, or lacks some ({', '.join(wrong[:3])})"
            f"; choose a plain one such as vit_small_patch16_224"
        )
    distilled.load_state_dict(state)
    _check_same(model, distilled)
    return distilled.train(model.training)


def require_plain(encoder: Encoder) -> None:
    """Refuse a student that has no place for a distillation token in timm's layout.

    Raises:
        UsageError: No ViT of timm's own kind, or one without class token, with registers or with a second token.
    """
    plain = isinstance(encoder, VisionTransformer) and not isinstance(encoder, VisionTransformerDistilled)
    if not plain or encoder.cls_token is None or num_prefix_tokens(encoder) != 1 or encoder.pos_embed is None:
        front = f" with {num_prefix_tokens(encoder)} tokens before its patches" if has_tokens(encoder) else ""
        without = ", none of them a class token" if plain and encoder.cls_token is None else ""
        raise UsageError(
            f"a distillation token goes into a plain ViT of timm with a class token and without registers, and this "
            f"is a {type(encoder).__name__}{front}{without}; choose a student such as vit_small_patch16_224"
        )


def hold_position(model: Any) -> None:
    """Keep tokens without a position without one in training, in a model of `as_timm`.

    Their rows of the position table are zeros; no gradient reaches them.
    """
    rows = torch.ones(1, model.pos_embed.shape[1], 1)
    rows[:, list(model.without_position)] = 0
    model.pos_embed.register_hook(lambda gradient: gradient * rows.to(gradient))


def _distilled_like(encoder: Encoder, drop_path: float) -> Any:
    block = encoder.blocks[0]
    height, width = image_size(encoder)
    scale: dict[str, Any] = {"init_values": 1e-5} if hasattr(getattr(block, "ls1", None), "gamma") else {}
    return create_encoder(
        "deit_base_distilled_patch16_224",
        image_size=(height, width),
        in_chans=in_chans(encoder),
        drop_path=drop_path,
        patch_size=patch_size(encoder),
        embed_dim=embed_dim(encoder),
        depth=depth(encoder),
        num_heads=int(block.attn.num_heads),
        mlp_ratio=block.mlp.fc1.out_features / embed_dim(encoder),
        qkv_bias=block.attn.qkv.bias is not None,
        **scale,
    )


def _with_free_token(encoder: Encoder) -> tuple[Tensor, range]:
    """Return the positions with a row of zeros for the distillation token, and for a class token that has none.

    Beside them the numbers of these rows.
    """
    positions = encoder.pos_embed.detach()
    num_prefix = positions.shape[1] - num_patches(encoder)
    zeros = positions.new_zeros(1, 2 - num_prefix, positions.shape[2])
    return torch.cat([positions[:, :num_prefix], zeros, positions[:, num_prefix:]], dim=1), range(num_prefix, 2)


@torch.no_grad()
def _check_same(model: DistilledVisionTransformer, timm_model: Any) -> None:
    """Refuse a student whose blocks compute something else than timm's plain ones, whatever their tensors' names."""
    mode = model.training
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(1, in_chans(timm_model), *image_size(timm_model), generator=generator)
    expected = torch.stack(model.eval().features(images), dim=1)
    actual = timm_model.eval().forward_features(images)[:, :2]
    model.train(mode)
    if not torch.allclose(actual, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())):
        raise UsageError(
            "this student computes something else than timm's distilled layout with the same weights (another "
            "activation or norm); choose a plain one such as vit_small_patch16_224"
        )
