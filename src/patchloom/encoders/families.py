"""How encoders of one class answer what is asked of every encoder, and which classes there are.

A `Family` belongs to a class of modules and knows it inside out; everything else asks (`properties`, `stages`,
`resize`, `anysize`) and knows no class. A new kind of encoder enters by one file: its module, its family, and
`@register(TheModule)` on the latter. What it has in common with timm's ViTs it need not say.

>>> import timm
>>> family_of(timm.create_model("vit_tiny_patch16_224", num_classes=0)).kind
'image'
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import NoneType
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from torch import Tensor, nn

from patchloom.encoders.encoder import Encoder
from patchloom.encoders.patches import Grid, shown
from patchloom.encoders.positions import PositionRule
from patchloom.errors import UsageError

if TYPE_CHECKING:
    from typing_extensions import TypeIs

AXES = {"image": "(B, C, H, W)", "clip": "(B, C, T, H, W)", "volume": "(B, C, D, H, W)", "signal": "(B, C, L)"}
"""Batches of each kind of input that encoders take."""
KINDS = "timm's ViT, BEiT and EVA models"
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Embedded:
    """Tokens before the first block, and what every block needs besides them."""

    x: Tensor
    """(B, P + N, D)."""
    block_kwargs: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of a block: a shared relative-position bias, rotary positions."""
    rope_by_block: Tensor | None = None
    """Rotary positions that differ from block to block, first dimension the block."""
    kept: Tensor | None = None
    """(B, P + n) int64: the tokens that are there, where blocks have relative-position tables of their own."""

    def kwargs_of(self, number: int) -> dict[str, Any]:
        """Return the keyword arguments of block `number` (0-based)."""
        if self.rope_by_block is None:
            return self.block_kwargs
        return {**self.block_kwargs, "rope": self.rope_by_block[number]}


class Family:
    """What is asked of an encoder of one class, answered as by timm's ViTs; a family overrides what differs.

    Blocks are `encoder.blocks`, the final norm is `encoder.norm`, as `Encoder` declares them.

    Attributes:
        kind: What a sample is: `image`, `clip`, `volume` or `signal`.
        patch_embeds: Classes of patch embeddings that are one convolution `proj` and a `norm`, token by token.
        drops_tokens: Patches can be left out of the row of tokens. Not so where blocks read a token's neighbours from
            its place in the row.
        has_class_token: There can be one. Where not, what `global_pool` makes of the patches stands for it.
        takes_registers: The module takes `register_argument` and `no_embed_class`.
        register_argument: The argument that says how many register tokens it has.
        square_patches: Patches have the same side along the last two axes; where not, each axis has its own.
        stem: Names of what stands before the blocks.
        behind: Names of what stands behind or beside them; stem, blocks and these are all there is.
    """

    kind: ClassVar[str] = "image"
    patch_embeds: ClassVar[tuple[type[nn.Module], ...]] = ()
    drops_tokens: ClassVar[bool] = True
    has_class_token: ClassVar[bool] = True
    takes_registers: ClassVar[bool] = False
    register_argument: ClassVar[str] = "reg_tokens"
    square_patches: ClassVar[bool] = True
    stem: ClassVar[frozenset[str]] = frozenset(
        {"cls_token", "dist_token", "reg_token", "mask_token", "pos_embed", "patch_embed", "norm_pre"}
    )
    behind: ClassVar[frozenset[str]] = frozenset(
        {"norm", "fc_norm", "head", "head_dist", "attn_pool", "rope", "rel_pos_bias"}
    )

    # What it is.

    def input_size(self, encoder: Any) -> Grid:
        """Return the sides of the inputs the encoder is set up for, without channels."""
        return tuple(int(side) for side in encoder.patch_embed.img_size)

    def grid_size(self, encoder: Any) -> Grid:
        """Return the number of patches along each axis of such an input."""
        return tuple(int(number) for number in encoder.patch_embed.grid_size)

    def patch_shape(self, encoder: Any) -> Grid:
        """Return the sides of a patch, as many as an input has axes."""
        side = int(encoder.patch_embed.feat_ratio())  # behind a convolutional stem, its strides count too
        return (side,) * len(self.grid_size(encoder))

    def in_chans(self, encoder: Any) -> int:
        """Return the number of channels of an input."""
        return int(encoder.patch_embed.proj.weight.shape[1])

    def layer_of(self, name: str, depth: int) -> int:
        """Return the layer of a parameter for layer-wise learning rates, by its name in the encoder.

        0 for embeddings and the norm behind them, i + 1 for block i, depth + 1 for the rest: head, final norm, learnt
        frequencies of rotary positions, and a relative-position table shared by all blocks, as in the published code of
        BEiT (Bao et al. 2021, arXiv 2106.08254). timm groups them in the same way, but for that table (embeddings) and
        the final norm (last block).

        Raises:
            UsageError: The encoder has no parameter of that name.
        """
        first = name.split(".", 1)[0]
        if first in self.stem:
            return 0
        if first == "blocks":
            return int(name.split(".")[1]) + 1
        if first in self.behind:
            return depth + 1
        raise UsageError(
            f"it is not known how far from the head {name!r} is, so it has no learning rate; set layer_decay=1"
        )

    def undecayed(self, encoder: Any) -> set[str]:
        """Return the names of parameters that weight decay leaves alone besides vectors, biases and positions."""
        return set()

    # Other sizes.

    def sides(self, own: Grid, size: int | Grid) -> Grid:
        """Return all sides of an input whose size is given as people give it: one side, or each.

        Args:
            own: The sides the encoder is set up for.
            size: What is asked for.

        Raises:
            UsageError: Another number of sides than inputs have.
        """
        found = (size,) * len(own) if isinstance(size, int) else tuple(int(side) for side in size)
        if len(found) != len(own):
            raise UsageError(
                f"a size of {shown(found)} has {len(found)} sides; this encoder takes {self.kind}s of "
                f"{len(own)}, such as {shown(own)}"
            )
        return found

    def size_arguments(self, size: Grid) -> dict[str, Any]:
        """Return the arguments that make an encoder for inputs of a size."""
        return {"img_size": size}

    def shape_arguments(self, encoder: Any) -> dict[str, Any]:
        """Return all arguments that make a module of its shape from a plain entry point of timm."""
        block = encoder.blocks[0]
        return {
            **self.size_arguments(self.input_size(encoder)),
            "patch_size": self.patch_shape(encoder)[-1],
            "in_chans": self.in_chans(encoder),
            "embed_dim": int(encoder.embed_dim),
            "depth": len(encoder.blocks),
            "num_heads": int(block.attn.num_heads),
            "mlp_ratio": block.mlp.fc1.out_features / encoder.embed_dim,
        }

    def resize(self, encoder: Any, size: Grid) -> None:
        """Set the encoder up for inputs of another size, in place; patches fill it.

        Raises:
            UsageError: Its size is fixed.
        """
        if not hasattr(encoder, "set_input_size"):
            raise UsageError(f"{type(encoder).__name__} of this timm version works at {self.input_size(encoder)} only")
        encoder.set_input_size(img_size=size)

    # The forward pass, in the order in which it comes.

    def check(self, encoder: Any, inputs: Tensor) -> None:
        """Refuse inputs of another kind.

        Raises:
            UsageError: Another number of axes.
        """
        if inputs.ndim != len(self.grid_size(encoder)) + 2:
            raise UsageError(
                f"the encoder takes {self.kind}s {AXES.get(self.kind, '')}, and was given shape {tuple(inputs.shape)}"
            )

    def embed_patches(self, encoder: Any, inputs: Tensor, any_size: bool = False) -> Tensor:
        """Return the patch embedding (B, N, D), or (B, *grid, D), without positions.

        Args:
            encoder: The encoder.
            inputs: (B, C, *sides), normalised.
            any_size: Take sides that the encoder is not set up for; patches fill them.

        Raises:
            UsageError: The encoder is set up for another size.
        """
        self.check(encoder, inputs)
        stem = encoder.patch_embed
        strict = getattr(stem, "strict_img_size", False)
        if not any_size:
            own = self.input_size(encoder)
            if strict and tuple(inputs.shape[2:]) != own:
                raise UsageError(
                    f"{self.kind}s of {shown(tuple(inputs.shape[2:]))} pixels; the encoder is set up for "
                    f"{shown(own)}, and its positions are resampled by set_image_size"
                )
            x: Tensor = stem(inputs)
            return x
        if strict:  # timm's own refuses other sizes than it was made for
            stem.strict_img_size = False
        try:
            x = stem(inputs)
        finally:
            if strict:
                stem.strict_img_size = strict
        return x if x.ndim == 3 else x.flatten(1, -2)

    def embeds_patches_apart(self, encoder: Any) -> bool:
        """Return whether the patch embedding is one linear layer on each patch, and nothing random follows it."""
        if not isinstance(encoder.patch_embed, self.patch_embeds):
            return False
        proj: Any = encoder.patch_embed.proj
        still = not encoder.training or not self.drops_in_front(encoder)
        return (
            still
            and type(proj) in CONVOLUTIONS
            and tuple(proj.kernel_size) == tuple(proj.stride) == self.patch_shape(encoder)
            and not any((*proj.padding, *proj._forward_hooks, *proj._forward_pre_hooks))
        )

    def drops_in_front(self, encoder: Any) -> bool:
        """Return whether training may drop something between the patch embedding and the first block.

        Where nothing is dropped, timm has nothing there, or a module that does nothing.
        """
        drop: Any = getattr(encoder, "pos_drop", None)
        return getattr(drop, "p", 0.0) != 0 or not isinstance(
            getattr(encoder, "patch_drop", None), nn.Identity | NoneType
        )

    def add_positions(self, encoder: Any, x: Tensor) -> Embedded:
        """Return what enters the first block, for patches (B, N, D) or (B, *grid, D) of the encoder's size.

        Prefix tokens and positions are added; a norm in front of the blocks (`norm_pre`) follows elsewhere.
        """
        return Embedded(encoder._pos_embed(x))

    def add_positions_at(self, encoder: Any, x: Tensor, grid: Grid, rule: PositionRule) -> Embedded:
        """Return the same for patches (B, N, D) of another grid, with gradients to the encoder's own positions.

        Raises:
            UsageError: The encoder cannot work at two sizes at once.
        """
        raise UsageError(
            f"{type(encoder).__name__} takes {self.kind}s of its own size only; let all crops have that size"
        )

    def keep(self, encoder: Any, embedded: Embedded, keep: Tensor) -> Embedded:
        """Return what blocks need besides tokens, for the patches that stay; the tokens are those of them already.

        Args:
            encoder: The encoder.
            embedded: With x (B, P + n, D); all else is of the whole grid.
            keep: (B, n) int64, numbers of the patches.
        """
        return embedded

    # A classifier of it.

    def classifier_arguments(self, encoder: Any, mean: bool) -> dict[str, Any]:
        """Return the arguments that make a module of this sort for fine-tuning.

        Args:
            encoder: What was pre-trained.
            mean: Classify the mean over patches; else the class token.
        """
        return {"global_pool": "avg" if mean else "token"}

    def classifier_state(self, encoder: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the encoder's tensors under the names of such a module."""
        return state


AnyFamily = TypeVar("AnyFamily", bound=type[Family])

_families: dict[type, Family] = {}


def register(*classes: type[nn.Module]) -> Callable[[AnyFamily], AnyFamily]:
    """Make modules of some classes, and of classes derived from them, encoders: a decorator of their `Family`."""

    def remember(family: AnyFamily) -> AnyFamily:
        for one in classes:
            _families[one] = family()
            Encoder.register(one)
        return family

    return remember


def find_family(encoder: nn.Module) -> Family | None:
    """Return the family of a module, or None where it is no encoder."""
    for one in type(encoder).__mro__:
        if one in _families:
            return _families[one]
    return None


def family_of(encoder: nn.Module) -> Family:
    """Return the family of an encoder.

    Raises:
        UsageError: It is none: it has no patch tokens to work with.
    """
    family = find_family(encoder)
    if family is None:
        raise UsageError(f"a {type(encoder).__name__} has no patch tokens from end to end; take one of {KINDS}")
    return family


def has_tokens(encoder: nn.Module) -> TypeIs[Encoder]:
    """Return whether a model is an encoder, whose patches go through it as tokens from end to end."""
    return find_family(encoder) is not None


def require_tokens(encoder: nn.Module) -> None:
    """Refuse an image model that is no encoder.

    Raises:
        UsageError: It has no patch tokens to work with.
    """
    family_of(encoder)
