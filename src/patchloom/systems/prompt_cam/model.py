"""Class prompts: one per class in front of a frozen ViT's tokens, which makes it a classifier that shows why.

The prompt of a class stands in front of the image's tokens, one shared vector scores its output, and its row of
the last block's attention, one map per head, is the explanation. "Prompt-CAM: Making Vision Transformers Interpretable
for Fine-Grained Analysis", arXiv 2501.09333; the deep form as in the published code, the shallow one as in the paper.

>>> import timm, torch
>>> encoder = timm.create_model("vit_tiny_patch16_224", num_classes=0)
>>> model = PromptCAM(encoder, num_classes=5).eval()
>>> logits, maps = model.forward_with_attention(torch.randn(2, 3, 224, 224))
>>> logits.shape, maps.shape
(torch.Size([2, 5]), torch.Size([2, 3, 5, 14, 14]))
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Annotated, Any, NamedTuple

import torch
from annotated_types import Ge
from torch import Tensor, nn

from patchloom.base.choices import PromptDepth as Depth
from patchloom.base.ranges import Count, Fraction, checked
from patchloom.encoders import (
    Encoder,
    embed,
    embed_dim,
    final_norm,
    grid_size,
    image_size,
    num_prefix_tokens,
    patch_size,
)
from patchloom.encoders.attend import Group, Rewrite, attend_block, check_separable
from patchloom.encoders.insertion import Insertion, Replacement, active, check_family, insert, insertions
from patchloom.errors import UsageError

NAME = "prompt_cam"
"""What the adapter is called on an encoder that `PromptCAM` was made of."""
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


class ClassPrompts(Insertion):
    """The prompts of all classes and the vector that scores them, as an insertion: see `PromptCAM` for the arguments.

    While it is active, the encoder's logits are the classes', and its tokens are those that prompts stood in front of.

    Attributes:
        prompts: Deep (blocks, C, D), or (1, C, D) where `helper_prompts` is not C; shallow (1, C, D).
        helper_prompts: (blocks - 1, m, D) where m is neither 0 nor C, else None.
        head: The shared vector that scores a prompt's output, with a bias.
    """

    head: nn.Module
    kind = "prompt_cam"

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
        self.arguments = {
            "num_classes": num_classes,
            "depth": depth,
            "prompt_dropout": prompt_dropout,
            "helper_prompts": helper_prompts,
            "force": force,
        }
        _check(num_classes, depth, prompt_dropout, helper_prompts, force)
        if getattr(encoder, "attn_pool", None) is not None:
            raise UsageError("the encoder pools by attention, which prompts bypass; take one without a map head")
        check_family(encoder)
        check_separable(encoder)
        self.num_classes = num_classes
        self.depth = depth
        width, blocks = embed_dim(encoder), len(encoder.blocks)
        helpers = num_classes if helper_prompts is None else helper_prompts
        sets = blocks if depth == "deep" and helpers == num_classes else 1
        self.prompts = nn.Parameter(torch.empty(sets, num_classes, width))
        has_others = depth == "deep" and helpers not in (0, num_classes)
        self.helper_prompts = nn.Parameter(torch.empty(blocks - 1, helpers, width)) if has_others else None
        self.dropout = nn.Dropout(prompt_dropout)
        self.head = SharedVector(width, 1)
        self._carried: dict[int, Tensor] = {}
        bound = math.sqrt(6 / (3 * patch_size(encoder) ** 2 + width))
        for tensor in (self.prompts, self.helper_prompts):
            if tensor is not None:
                nn.init.uniform_(tensor, -bound, bound)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_carried": {}}

    def logits(self, images: Tensor) -> Tensor:
        """Return logits (B, C) for (B, 3, H, W) normalised images, without what only the image's tokens need."""
        return self.last(self.before_last(images))[0]

    def before_last(self, images: Tensor) -> LastInput:
        """Run all blocks but the last.

        Args:
            images: (B, 3, H, W), normalised.

        Raises:
            UsageError: Images of another size than the encoder's.
        """
        encoder = self.encoder
        _check_images(encoder, images)
        embedded = embed(encoder, images)
        last = len(encoder.blocks) - 1
        x = embedded.x
        for number in range(last):
            x = self._run(number, x, **embedded.kwargs_of(number))
        size = (images.shape[-2], images.shape[-1])
        prompts = self._entering(last, x)
        assert prompts is not None
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
        logits: Tensor = self.head(final_norm(self.encoder, out))
        return logits, attention

    def maps(self, attention: Tensor, grid: tuple[int, int]) -> Tensor:
        """Return the maps (B, H, C, h, w) in the last block's attention (B, H, C, C + P + N)."""
        patches = attention[..., self.num_classes + num_prefix_tokens(self.encoder) :]
        return patches.unflatten(-1, grid)

    # As an insertion: every block is run with its prompts.

    def replacements(self, encoder: Encoder) -> Iterable[Replacement]:
        """Return the blocks' forward passes with prompts, and how many tokens stand in front in each."""
        last = len(encoder.blocks) - 1
        for number, block in enumerate(encoder.blocks):
            yield block, "forward", partial(self._run, number)
            helpers = 0 if self.helper_prompts is None else self.helper_prompts.shape[1]
            full = number == last or self.depth == "shallow" or len(self.prompts) > 1
            yield block, "extra_tokens", self.num_classes if full else helpers

    def detach(self) -> None:
        """Stop acting."""
        super().detach()
        self._carried.clear()

    def head_input(self, encoder: Encoder, x: Tensor) -> Tensor:
        """Return the normed outputs of the prompts of the latest forward pass, (B, C, D)."""
        assert self.prompt_outputs is not None
        return final_norm(encoder, self.prompt_outputs)

    def _run(self, number: int, x: Tensor, **kwargs: Any) -> Tensor:
        """Return what block `number` makes of the encoder's tokens (B, P + N, D); keep what it makes of prompts."""
        if kwargs.pop("attn_mask", None) is not None or kwargs.pop("is_causal", False):
            raise UsageError("an attention mask and class prompts do not go together; leave the mask out")
        block = self.encoder.blocks[number]
        is_last = number == len(self.encoder.blocks) - 1
        prompts = self._entering(number, x)
        if self.depth == "deep" and not is_last:
            guests = None if prompts is None else Group(prompts, is_guest=True)
            return attend_block(block, Group(x), guests, **kwargs)[0]
        assert prompts is not None
        count = self.num_classes
        z = torch.cat([prompts.expand(len(x), -1, -1), x], dim=1)
        z, _ = attend_block(block, Group(z, guests=count), **kwargs)
        if is_last:
            self.prompt_outputs = z[:, :count]
        else:
            self._carried[number + 1] = z[:, :count]
        return z[:, count:]

    def _entering(self, number: int, x: Tensor) -> Tensor | None:
        """Return the prompts that enter a block, (B or 1, m, D); None where it has none."""
        last = len(self.encoder.blocks) - 1
        if self.depth == "shallow":
            return self._carried[number] if number else self._with_dropout(self.prompts, len(x))
        if number == last:
            return self._with_dropout(self.prompts[-1:], len(x))
        sets = self.prompts if self.helper_prompts is None else self.helper_prompts
        if sets is self.prompts and len(sets) == 1:
            return None
        return self._with_dropout(sets[number : number + 1], len(x))

    def _with_dropout(self, prompts: Tensor, batch: int) -> Tensor:
        """Return prompts (1, m, D) as they are, or (B, m, D) where dropout makes them differ between images."""
        return self.dropout(prompts.expand(batch, -1, -1)) if self.training and self.dropout.p else prompts


class SharedVector(nn.Linear):
    """One score per token: (…, D) to (…)."""

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the scores of tokens."""
        return super().forward(tokens).squeeze(-1)


class PromptCAM(nn.Module):
    """A frozen encoder with a prompt for each class.

    Deep: every block has prompts of its own, whose outputs are thrown away but for the last block's. There prompts
    are keys and values only, and in the last block the image's tokens are: the same logits as from the whole row of
    tokens at little more than the cost of the plain encoder. Shallow: one set goes through all blocks.

    Args:
        encoder: A timm `VisionTransformer`, `Beit` or `Eva`; it is frozen, and the prompts become its adapter
            `prompt_cam` (`adapt.insertion.remove` takes them off again).
        num_classes: Classes C, at least 2.
        depth: `deep` or `shallow`.
        prompt_dropout: Dropout on the prompts in training, in [0, 1); paper: 0.1 for DINO, 0 for DINOv2.
        helper_prompts: Prompts in each block but the last, deep only; default: C as published; 0: none, and no
            gradient is computed below the last block.
        force: Allow more than 4096 classes.

    Attributes:
        encoder: The encoder.
        added: The `ClassPrompts` on it.

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
        insert(encoder, ClassPrompts(encoder, num_classes, depth, prompt_dropout, helper_prompts, force), NAME)
        self.encoder = encoder

    @classmethod
    def of(cls, encoder: Encoder) -> PromptCAM:
        """Return the model that an encoder and the class prompts active on it make.

        Raises:
            UsageError: No class prompts are active on the encoder.
        """
        insertion = insertions(encoder).get(active(encoder) or "")
        if not isinstance(insertion, ClassPrompts):
            raise UsageError("the model has no class prompts; train them with: patchloom adapt prompt_cam")
        model = cls.__new__(cls)
        nn.Module.__init__(model)
        model.encoder = encoder
        return model

    @property
    def added(self) -> ClassPrompts:
        """The class prompts on the encoder."""
        insertion = insertions(self.encoder)[active(self.encoder) or NAME]
        assert isinstance(insertion, ClassPrompts)
        return insertion

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return self.added.num_classes

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, C) for (B, 3, H, W) normalised images.

        Raises:
            UsageError: Images of another size than the encoder's.
        """
        return self.added.logits(images)

    def forward_with_attention(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits (B, C), and attention maps (B, H, C, h, w) of the last block.

        A map holds what a class prompt gives to each patch, after softmax; what it gives to prompts and prefix tokens
        is left out, so it sums to less than 1.
        """
        entering = self.added.before_last(images)
        logits, attention = self.added.last(entering, explicit=True)
        assert attention is not None
        return logits, self.added.maps(attention, entering.grid)

    def adapter_state_dict(self) -> dict[str, Tensor]:
        """Return what was added to the encoder: `prompts`, `head.weight`, `head.bias` (and `helper_prompts`)."""
        return self.added.stored_state()

    def load_adapter_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take prompts and head from an adapter's tensors.

        Raises:
            UsageError: They are for other classes, another encoder or another form.
        """
        own_state = self.adapter_state_dict()
        if set(state) != set(own_state):
            raise UsageError(
                f"the adapter holds {', '.join(sorted(state))}; this model has {', '.join(sorted(own_state))}"
            )
        given, here = state["prompts"].shape, own_state["prompts"].shape
        if given[1] != here[1]:
            raise UsageError(f"the adapter has prompts for {given[1]} classes, the model for {here[1]}")
        for name, value in own_state.items():
            if state[name].shape != value.shape:
                raise UsageError(
                    f"the adapter's {name} is {tuple(state[name].shape)}, the model's {tuple(value.shape)}: "
                    f"it belongs to another encoder or another depth"
                )
        self.added.load_stored_state(dict(state))


def _check_images(encoder: Encoder, images: Tensor) -> None:
    height, width = image_size(encoder)
    if getattr(encoder.patch_embed, "strict_img_size", True) and tuple(images.shape[-2:]) != (height, width):
        raise UsageError(
            f"the images are {images.shape[-2]}x{images.shape[-1]} pixels and the encoder takes {height}x{width}; "
            f"resize them, or set image_size"
        )


@checked
def _check(
    num_classes: Annotated[int, Ge(2)],
    depth: Depth,
    prompt_dropout: Fraction,
    helper_prompts: Count | None,
    force: bool,
) -> None:
    """Refuse what no model can be made of."""
    if num_classes > MOST_CLASSES and not force:
        raise UsageError(
            f"num_classes is {num_classes}: every class is a token, and attention to more than {MOST_CLASSES:,} is "
            f"beyond most machines; set force to try, or take fewer classes"
        )
    if helper_prompts is not None and depth == "shallow":
        raise UsageError("helper_prompts belong to depth=deep; shallow prompts go through all blocks")
