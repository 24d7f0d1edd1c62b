"""Prompt-CAM: one prompt per class makes a frozen ViT a classifier that shows what it decided by.

The prompt of a class stands in front of the image's tokens, one shared vector scores its output, and its row of
the last block's attention, one map per head, is the explanation. "Prompt-CAM: Making Vision Transformers Interpretable
for Fine-Grained Analysis", arXiv 2501.09333; specification, section 2.

>>> import timm, torch
>>> encoder = timm.create_model("vit_tiny_patch16_224", num_classes=0)
>>> model = PromptCAM(encoder, num_classes=5).eval()
>>> logits, maps = model.forward_with_attention(torch.randn(2, 3, 224, 224))
>>> logits.shape, maps.shape
(torch.Size([2, 5]), torch.Size([2, 3, 5, 14, 14]))
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from patchloom.encoders import (
    Embedded,
    Encoder,
    depth,
    embed,
    embed_dim,
    final_norm,
    grid_size,
    image_size,
    num_prefix_tokens,
    patch_size,
)
from patchloom.encoders.attend import Group, Rewrite, attend_block, check_separable
from patchloom.errors import UsageError, unknown_name

Depth = Literal["deep", "shallow"]
MOST_CLASSES = 4096
"""Attention grows with the square of the prompts: above this it has to be asked for."""


class LastInput(NamedTuple):
    """What enters the last block: enough to run it again and again."""

    x: Tensor
    """(B, P + N, D): the encoder's own tokens."""
    prompts: Tensor
    """(B or 1, C, D): the class prompts."""
    block_kwargs: dict[str, Any]
    """Positions, as the block takes them."""
    grid: tuple[int, int]
    """Patches down and across."""


class PromptCAM(nn.Module):
    """A frozen encoder with a prompt for each class.

    Deep: every block has prompts of its own, whose outputs are thrown away but for the last block's. There prompts
    are keys and values only, and in the last block the image's tokens are: the same logits as from the whole row of
    tokens at little more than the cost of the plain encoder. Shallow: one set goes through all blocks.

    Args:
        encoder: A timm `VisionTransformer`, `Beit` or `Eva`; it is frozen (`requires_grad_(False)`), else left as it
            is.
        num_classes: Classes C, at least 2.
        depth: `deep` or `shallow`.
        prompt_dropout: Dropout on the prompts in training, in [0, 1); paper: 0.1 for DINO, 0 for DINOv2.
        helper_prompts: Prompts in each block but the last, deep only; default: C as published; 0: none, and no
            gradient is computed below the last block.
        force: Allow more than 4096 classes.

    Attributes:
        prompts: Deep (blocks, C, D), or (1, C, D) where `helper_prompts` is not C; shallow (1, C, D).
        helper_prompts: (blocks - 1, m, D) where m is neither 0 nor C, else None.
        head: The shared vector that scores a prompt's output, with a bias.

    Raises:
        UsageError: A value outside its range, or an encoder whose attention cannot be read.
    """

    def __init__(
        self,
        encoder: Encoder,
        num_classes: int,
        depth: Depth = "deep",
        prompt_dropout: float = 0.1,
        helper_prompts: int | None = None,
        force: bool = False,
    ) -> None:
        super().__init__()
        _check(num_classes, depth, prompt_dropout, helper_prompts, force)
        if getattr(encoder, "attn_pool", None) is not None:
            raise UsageError("the encoder pools by attention, which prompts bypass; take one without a map head")
        check_separable(encoder)
        self.encoder = encoder.requires_grad_(False)
        self.num_classes = num_classes
        self.depth = depth
        width, blocks = embed_dim(encoder), len(encoder.blocks)
        helpers = num_classes if helper_prompts is None else helper_prompts
        sets = blocks if depth == "deep" and helpers == num_classes else 1
        self.prompts = nn.Parameter(torch.empty(sets, num_classes, width))
        has_others = depth == "deep" and helpers not in (0, num_classes)
        self.helper_prompts = nn.Parameter(torch.empty(blocks - 1, helpers, width)) if has_others else None
        self.dropout = nn.Dropout(prompt_dropout)
        self.head = nn.Linear(width, 1)
        bound = math.sqrt(6 / (3 * patch_size(encoder) ** 2 + width))
        for tensor in (self.prompts, self.helper_prompts):
            if tensor is not None:
                nn.init.uniform_(tensor, -bound, bound)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, C) for (B, 3, H, W) normalised images.

        Raises:
            UsageError: Images of another size than the encoder's.
        """
        return self.last(self.before_last(images))[0]

    def forward_with_attention(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits (B, C), and attention maps (B, H, C, h, w) of the last block.

        A map holds what a class prompt gives to each patch, after softmax; what it gives to prompts and prefix tokens
        is left out, so it sums to less than 1.
        """
        entering = self.before_last(images)
        logits, attention = self.last(entering, explicit=True)
        assert attention is not None
        return logits, self.maps(attention, entering.grid)

    def maps(self, attention: Tensor, grid: tuple[int, int]) -> Tensor:
        """Return the maps (B, H, C, h, w) in the last block's attention (B, H, C, C + P + N)."""
        patches = attention[..., self.num_classes + num_prefix_tokens(self.encoder) :]
        return patches.unflatten(-1, grid)

    def before_last(self, images: Tensor) -> LastInput:
        """Run all blocks but the last.

        Args:
            images: (B, 3, H, W), normalised.

        Raises:
            UsageError: Images of another size than the encoder's.
        """
        self._check_images(images)
        encoder = self.encoder
        embedded = embed(encoder, images)
        last = depth(encoder) - 1
        if self.depth == "shallow":
            x, prompts = self._carry_prompts(embedded, last)
        else:
            x, prompts = embedded.x, self._with_dropout(self.prompts[-1:], len(images))
            for number in range(last):
                helpers = self._helpers(number, len(images))
                guests = None if helpers is None else Group(helpers, is_guest=True)
                x, _ = attend_block(encoder.blocks[number], Group(x), guests, **embedded.kwargs_of(number))
        size = (images.shape[-2], images.shape[-1])
        return LastInput(x, prompts, embedded.kwargs_of(last), grid_size(encoder, size))

    def last(
        self, entering: LastInput, *, explicit: bool = False, rewrite: Rewrite | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Run the last block for the prompts and score them.

        Args:
            entering: What `before_last` returned; its tensors may have been repeated along the batch.
            explicit: Also return the attention.
            rewrite: Changes the attention before it is used; goes with `explicit`.

        Returns:
            Logits (B, C), and the prompts' attention (B, H, C, C + P + N) where it was asked for.
        """
        out, attention = attend_block(
            self.encoder.blocks[-1],
            Group(entering.prompts, is_guest=True),
            Group(entering.x),
            explicit=explicit,
            rewrite=rewrite,
            **entering.block_kwargs,
        )
        logits: Tensor = self.head(final_norm(self.encoder, out)).squeeze(-1)
        return logits, attention

    def adapter_state_dict(self) -> dict[str, Tensor]:
        """Return what was added to the encoder: `prompts`, `head.weight`, `head.bias` (and `helper_prompts`)."""
        return {name: value for name, value in self.state_dict().items() if not name.startswith("encoder.")}

    def load_adapter_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take prompts and head from an adapter's tensors.

        Raises:
            UsageError: They are for other classes, another encoder or another form.
        """
        own = self.adapter_state_dict()
        if set(state) != set(own):
            raise UsageError(f"the adapter holds {', '.join(sorted(state))}; this model has {', '.join(sorted(own))}")
        told, here = state["prompts"].shape, own["prompts"].shape
        if told[1] != here[1]:
            raise UsageError(f"the adapter has prompts for {told[1]} classes, the model for {here[1]}")
        for name, value in own.items():
            if state[name].shape != value.shape:
                raise UsageError(
                    f"the adapter's {name} is {tuple(state[name].shape)}, the model's {tuple(value.shape)}: "
                    f"it belongs to another encoder or another depth"
                )
        self.load_state_dict({**self.state_dict(), **state})

    def _helpers(self, number: int, batch: int) -> Tensor | None:
        """Return the prompts of a block below the last, (B or 1, m, D); None where there are none."""
        sets = self.helper_prompts if self.helper_prompts is not None else self.prompts
        if sets is self.prompts and len(sets) == 1:
            return None
        return self._with_dropout(sets[number : number + 1], batch)

    def _with_dropout(self, prompts: Tensor, batch: int) -> Tensor:
        """Return prompts (1, m, D) as they are, or (B, m, D) where dropout makes them differ between images."""
        return self.dropout(prompts.expand(batch, -1, -1)) if self.training and self.dropout.p else prompts

    def _carry_prompts(self, embedded: Embedded, last: int) -> tuple[Tensor, Tensor]:
        """Run prompts and tokens in one row through the blocks before `last`, and return tokens and prompts."""
        count, batch = self.num_classes, len(embedded.x)
        z = torch.cat([self._with_dropout(self.prompts, batch).expand(batch, -1, -1), embedded.x], dim=1)
        for number in range(last):
            z, _ = attend_block(self.encoder.blocks[number], Group(z, guests=count), **embedded.kwargs_of(number))
        return z[:, count:], z[:, :count]

    def _check_images(self, images: Tensor) -> None:
        height, width = image_size(self.encoder)
        if getattr(self.encoder.patch_embed, "strict_img_size", True) and tuple(images.shape[-2:]) != (height, width):
            raise UsageError(
                f"the images are {images.shape[-2]}x{images.shape[-1]} pixels and the encoder takes {height}x{width}; "
                f"resize them, or set image_size"
            )


def _check(num_classes: int, depth: str, dropout: float, helpers: int | None, force: bool) -> None:
    """Refuse what no model can be made of."""
    if num_classes < 2:
        raise UsageError(f"num_classes is {num_classes}; telling classes apart takes at least 2")
    if num_classes > MOST_CLASSES and not force:
        raise UsageError(
            f"num_classes is {num_classes}: every class is a token, and attention to more than {MOST_CLASSES:,} is "
            f"beyond most machines; set force to try, or take fewer classes"
        )
    if depth not in get_args(Depth):
        raise unknown_name("depth", depth, get_args(Depth))
    if not 0 <= dropout < 1:
        raise UsageError(f"prompt_dropout is {dropout}; it must be in [0, 1)")
    if helpers is not None and helpers < 0:
        raise UsageError(f"helper_prompts is {helpers}; it must be at least 0")
    if helpers is not None and depth == "shallow":
        raise UsageError("helper_prompts belong to depth=deep; shallow prompts go through all blocks")
