"""A frozen ViT as the encoder of another sense (ViT-Lens, Lei et al. 2024, arXiv 2311.16081).

Tokens of a sense go through a lens to the blocks of a CLIP's image tower, which stay as they are; what comes out lies
in the space of its images and texts. Only the tokenizer and the lens learn, and what is unlocked besides.

>>> import timm
>>> from patchloom.systems.vit_lens.tokenizers import PointTokenizer
>>> from patchloom.systems.vit_lens.lens import PerceiverLens
>>> vit = timm.create_model("vit_micro_patch4_32", num_classes=0)
>>> lens = PerceiverLens(64, 128, num_latents=64, depth=1, heads=4, head_dim=32, cross_head_dim=32)
>>> encoder = ModalityEncoder(vit, PointTokenizer(16, 8, embed_dim=64), lens, nn.Linear(128, 32, bias=False))
>>> encoder(torch.randn(2, 100, 3)).shape, encoder(torch.randn(2, 100, 3), return_tokens=True).shape
(torch.Size([2, 32]), torch.Size([2, 65, 128]))
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from patchloom.errors import UsageError
from patchloom.systems.clip.losses import contrastive_loss


def resize_positions(table: Tensor, count: int, prefix: int = 1) -> Tensor:
    """Return a table of positions for another number of tokens.

    Rows of a square grid are brought to the largest square with as many or fewer tokens (bicubic, antialiased); where
    that is not all, rows are repeated (nearest).

    Args:
        table: (prefix + n, W), n a square.
        count: Tokens.
        prefix: Rows in front that stay, those of the class token.

    Raises:
        UsageError: The rows are no square.
    """
    front, grid = table[:prefix], table[prefix:]
    if len(grid) == count:
        return table
    side, new = math.isqrt(len(grid)), math.isqrt(count)
    if side**2 != len(grid):
        raise UsageError(f"{len(grid)} positions are no square grid, so they cannot be brought to {count} tokens")
    square = grid.T.reshape(1, -1, side, side)
    square = F.interpolate(square, size=(new, new), mode="bicubic", antialias=True, align_corners=False)
    rows = square.flatten(2)  # (1, W, new * new)
    if new**2 != count:
        rows = F.interpolate(rows, size=count, mode="nearest")
    return torch.cat([front, rows[0].T])


class ModalityEncoder(nn.Module):
    """A sense through tokenizer and lens into the blocks of a frozen ViT.

    Args:
        vit: A plain ViT of timm with a class token, without its classifier; it becomes part of this module, its
            positions brought to the number of tokens, and its patch embedding goes where there is a tokenizer.
        tokenizer: Samples to `tokenizers.Tokens`; None: the patch embedding of the ViT, which then learns (touch).
        lens: Tokens (B, n, D) to (B, L, W); None: tokens go to the blocks as they are (depth).
        projection: Pooled features (B, W) to the common space (B, E); None: these are it.
        unlock_cls: The class token learns.
        unlock_pos: The positions of the ViT learn.
        unlock_first_blocks: So many of its first blocks learn.
        unlock_groups: So many groups of the ViT learn, counted from `unlock_from`: the stem (patch embedding, class
            token, positions, first norm), each block but the last, the last block with the final norm, the projection.
        unlock_from: `head` or `stem`.
        unlock_projection: The projection learns.
        skip_first_blocks: So many of the first blocks are taken out.
        tokenizer_positions: Positions of the tokenizer are added to its tokens.
        vit_positions: Positions of the ViT are added to what comes out of the lens.

    Raises:
        UsageError: The parts do not fit, or more is to be unlocked or taken out than there is.
    """

    def __init__(
        self,
        vit: Any,
        tokenizer: nn.Module | None = None,
        lens: nn.Module | None = None,
        projection: nn.Module | None = None,
        *,
        unlock_cls: bool = False,
        unlock_pos: bool = False,
        unlock_first_blocks: int = 0,
        unlock_groups: int = 0,
        unlock_from: Literal["head", "stem"] = "head",
        unlock_projection: bool = False,
        skip_first_blocks: int = 0,
        tokenizer_positions: bool = True,
        vit_positions: bool = True,
    ) -> None:
        super().__init__()
        check_vit(vit)
        if not 0 <= skip_first_blocks < len(vit.blocks):
            raise UsageError(f"{skip_first_blocks} blocks are to be taken out, and the ViT has {len(vit.blocks)}")
        width = int(vit.embed_dim)
        made = getattr(lens, "width", getattr(tokenizer, "embed_dim", width))
        if made != width:
            part = "tokenizer" if lens is None else "lens"
            raise UsageError(f"the {part} gives tokens of width {made}, and the ViT takes {width}")
        vit.blocks = vit.blocks[skip_first_blocks:]
        self.tokenizer, self.lens, self.vit = tokenizer, lens, vit
        self.projection = nn.Identity() if projection is None else projection
        self.tokenizer_positions, self.vit_positions = tokenizer_positions, vit_positions
        if tokenizer is not None:
            vit.patch_embed = nn.Identity()
            count = getattr(lens, "num_tokens", getattr(tokenizer, "num_tokens", None))
            if count is not None and vit_positions:
                table = resize_positions(vit.pos_embed.detach()[0], int(count))
                vit.pos_embed = nn.Parameter(table[None].clone())
        self._lock(unlock_cls, unlock_pos, unlock_first_blocks, unlock_groups, unlock_from, unlock_projection)

    def _lock(self, cls: bool, pos: bool, first: int, groups: int, end: str, projection: bool) -> None:
        """Let tokenizer and lens learn, and of the ViT what is asked for."""
        vit: Any = self.vit
        self.vit.requires_grad_(False)
        self.projection.requires_grad_(projection)
        stem = [vit.patch_embed, vit.cls_token, vit.pos_embed, vit.norm_pre]
        parts: list[list[Any]] = [stem, *([block] for block in vit.blocks), [self.projection]]
        parts[-2].append(vit.norm)
        if first > len(vit.blocks) or groups > len(parts):
            many, there = (first, len(vit.blocks)) if first > len(vit.blocks) else (groups, len(parts))
            raise UsageError(f"{many} blocks or groups are to learn, and there are {there}; lower it")
        learn: list[Any] = list(vit.blocks[:first])
        learn += [vit.cls_token] if cls else []
        learn += [vit.pos_embed] if pos else []
        for group in (parts[::-1] if end == "head" else parts)[:groups]:
            learn += group
        for part in learn:
            part.requires_grad_(True)

    def embed(self, samples: Tensor, **options: Any) -> Tensor:
        """Return the tokens (B, L, W) that come out of the lens; `options` are the tokenizer's, as `start_index`."""
        tokens: Tensor
        if self.tokenizer is None:
            patches: Any = self.vit.patch_embed
            tokens = patches(samples)
        else:
            tokens, places = self.tokenizer(samples, **options)
            if places is not None and self.tokenizer_positions:
                tokens = tokens + places
        return tokens if self.lens is None else self.lens(tokens)

    def forward(
        self, samples: Tensor, return_tokens: bool = False, num_blocks: int | None = None, **options: Any
    ) -> Tensor:
        """Return the features (B, E) of samples, not normalised.

        Args:
            samples: What the tokenizer takes: (B, N, F), (B, 1, H, W), (B, T, bins), (B, C, L); images, where there is
                none.
            return_tokens: Return (B, 1 + L, W) behind the last block in place of features, without the final norm:
                what a language model that knows the ViT takes as an image (InstructBLIP).
            num_blocks: Run only so many of the blocks; default: all.
            **options: Of the tokenizer: `start_index`, `features`.

        Raises:
            UsageError: Samples of another shape or with values that are not finite.
        """
        vit: Any = self.vit
        tokens = self.embed(samples, **options)
        x = torch.cat([vit.cls_token.expand(len(tokens), -1, -1), tokens], 1)
        if self.vit_positions:
            if x.shape[1] != vit.pos_embed.shape[1]:
                raise UsageError(
                    f"{x.shape[1] - 1} tokens come to the ViT, which has positions for {vit.pos_embed.shape[1] - 1}"
                )
            x = x + vit.pos_embed
        x = vit.norm_pre(x)
        for block in vit.blocks[:num_blocks]:
            x = block(x)
        if return_tokens:
            return x
        pooled = vit.forward_head(vit.norm(x), pre_logits=True)
        features: Tensor = self.projection(pooled)
        return features

    def encode(self, samples: Tensor, **options: Any) -> Tensor:
        """Return the features (B, E), of length 1, float32."""
        return F.normalize(self(samples, **options).float(), dim=-1)

    def trained(self) -> int:
        """Return the number of parameters that learn."""
        return sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)


def check_vit(vit: nn.Module) -> None:
    """Refuse a model whose blocks cannot be handed tokens of something else.

    Raises:
        UsageError: It is no plain ViT with a class token and a table of positions.
    """
    plain = isinstance(vit, VisionTransformer) and vit.cls_token is not None and vit.pos_embed is not None
    if not plain or vit.num_prefix_tokens != 1 or vit.no_embed_class:
        raise UsageError(
            f"a lens needs a plain ViT of timm with a class token and learnt positions, and this is a "
            f"{type(vit).__name__}; take a vit_… without registers"
        )


def tri_modal_contrastive_loss(
    image: Tensor | None, text: Tensor | None, modality: Tensor, logit_scale: Tensor, ids: Tensor | None = None
) -> Tensor:
    """Return the contrastive loss of a sense against images plus that against texts (arXiv 2311.16081, equation 3).

    Each is the mean of both directions; images and texts, which are frozen, are not set against each other. In several
    processes every one takes its rows against those of all.

    Args:
        image: (B, E), of length 1; None: there are none.
        text: (B, E), likewise.
        modality: (B, E), likewise; row i belongs to row i of the others.
        logit_scale: Logarithm of the factor on similarities, a scalar.
        ids: (B,) int64, equal where samples say the same, which then are no negatives of each other; None: all are.

    Raises:
        UsageError: There are neither images nor texts.
    """
    partners = [each for each in (image, text) if each is not None]
    if not partners:
        raise UsageError("a sense is aligned to images, to texts or to both; give one of them")
    scale = logit_scale.exp()
    losses = [contrastive_loss(partner, modality, scale, ids).loss for partner in partners]
    return torch.stack(losses).sum()


class ViTLens(nn.Module):
    """The towers of a training checkpoint: a sense, images and texts, and the factor on similarities.

    Args:
        visual: Of the sense.
        image: Of images; None: there is none.
        text: Tokens (B, L) to (B, E); None: there is none.
    """

    about: dict[str, Any]
    """Settings it was made by, where it is of a run"""
    towers: list[Any]
    """The CLIP of images and texts, likewise; in a list, because its parts are modules here already"""

    def __init__(self, visual: ModalityEncoder, image: nn.Module | None, text: nn.Module | None) -> None:
        super().__init__()
        self.visual, self.image, self.text = visual, image, text
        self.about, self.towers = {}, []
        for tower in (image, text):
            if tower is not None:
                tower.requires_grad_(False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, samples: Tensor, **options: Any) -> Tensor:
        """Return the features (B, E) of samples of the sense, not normalised; see `ModalityEncoder`."""
        features: Tensor = self.visual(samples, **options)
        return features

    def encode_visual(self, samples: Tensor, normalize: bool = False, **options: Any) -> Tensor:
        """Return (B, E) of samples of the sense; of length 1, float32, if asked."""
        return _lengthened(self.visual(samples, **options), normalize)

    def encode_image(self, images: Tensor, normalize: bool = False) -> Tensor:
        """Return (B, E) of images (B, 3, H, W) normalised as the tower takes them; of length 1, float32, if asked."""
        return _lengthened(_there(self.image, "images")(images), normalize)

    def encode_text(self, tokens: Tensor, normalize: bool = False) -> Tensor:
        """Return (B, E) of tokens (B, L); of length 1, float32, if asked."""
        return _lengthened(_there(self.text, "texts")(tokens), normalize)


def _there(tower: nn.Module | None, what: str) -> nn.Module:
    if tower is None:
        raise UsageError(f"this checkpoint has no tower of {what}")
    return tower


def _lengthened(features: Tensor, normalize: bool) -> Tensor:
    return F.normalize(features.float(), dim=-1) if normalize else features
