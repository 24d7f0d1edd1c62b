"""Parameters added to an encoder from outside: no code of timm is edited or copied, and all of it comes off again.

An `Insertion` says which tokens, branches and replacements it adds, and where; hooks on the blocks put them there.
`insert` adds it, `activate` chooses among several, `remove` takes it off and leaves the encoder byte for byte as it
was. While one is active the encoder itself gives adapted tokens, features and logits, so that whatever works with an
encoder (`tokens`, `pooled`, `evaluate`, gradient checkpointing) works with an adapted one.

>>> import timm, torch
>>> class Shift(Insertion):  # adds a learnt vector to the output of every block
...     def __init__(self, encoder):
...         super().__init__()
...         self.shifts = torch.nn.Parameter(torch.ones(len(encoder.blocks), encoder.embed_dim))
...         self.branches = range(len(encoder.blocks))
...     def branch(self, number, x):
...         return self.shifts[number].expand_as(x)
>>> encoder = timm.create_model("vit_tiny_patch16_224", num_classes=0).eval()
>>> images = torch.randn(1, 3, 224, 224)
>>> plain = encoder(images)
>>> insert(encoder, Shift(encoder), "shift")
>>> torch.equal(encoder(images), plain)
False
>>> remove(encoder)
>>> torch.equal(encoder(images), plain)
True
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from patchloom.encoders import Encoder, depth, has_tokens
from patchloom.encoders.families import KINDS
from patchloom.errors import UsageError, unknown_name

Replacement = tuple[Any, str, Any]
"""An object, the name of one of its attributes, and what stands there while the insertion is active."""


class MISSING:
    """Stands for an attribute that was not there. A class, because a copy of an encoder keeps it as it is."""


class Insertion(nn.Module):
    """What is added to an encoder. Subclasses set the attributes below and override the methods they need.

    Attributes:
        branches: Numbers of the blocks that get a branch beside their MLP, see `branch`.
        branch_input: What a branch reads: the `residual` stream between attention and MLP, or what `norm2` makes of
            it (`normed`).
        updates: Numbers of the blocks whose MLP's update is changed, see `update`.
        token_counts: Number of tokens in front of all others inside each block; empty for none.
        carried: Tokens are put in before the first block and stay until the last; otherwise each block has its own,
            which are taken away after it.
        head: What turns features into logits, or None for features alone.
        prompt_outputs: (B, n, D), what the last block made of its extra tokens, before the final norm; of the latest
            forward pass.
    """

    needs_mlp_branch: ClassVar[bool] = False
    mergeable: ClassVar[bool] = False

    branches: Collection[int] = ()
    branch_input: Literal["residual", "normed"] = "residual"
    updates: Collection[int] = ()
    token_counts: Sequence[int] = ()
    carried: bool = False
    head: nn.Module | None

    def __init__(self) -> None:
        super().__init__()
        self.head = None
        self.prompt_outputs: Tensor | None = None
        self._undo: list[Any] = []
        self._residual: dict[int, Tensor] = {}
        # In a tuple, so that the encoder does not become a part of what is added to it.
        self._owner: tuple[Encoder, ...] = ()
        self._place: tuple[torch.device, torch.dtype] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # What belongs to a forward pass is no part of a copy.
        return {**vars(self), "prompt_outputs": None, "_residual": {}}

    # What a subclass says.

    def new_tokens(self, number: int, x: Tensor) -> Tensor:
        """Return the (B, n, D) tokens put in front of the tokens (B, P + N, D) that enter block `number`."""
        raise NotImplementedError

    def branch(self, number: int, x: Tensor) -> Tensor:
        """Return what is added to the output of block `number`, (B, T, D); `x` is as `branch_input` says."""
        raise NotImplementedError

    def update(self, number: int, f: Tensor) -> Tensor:
        """Return the changed update of the MLP of block `number`: `f` (B, T, D) is about to be added to the stream."""
        raise NotImplementedError

    def replacements(self, encoder: Encoder) -> Iterable[Replacement]:
        """Return what stands in for parts of the encoder while this is active."""
        return ()

    def features(self, encoder: Encoder, x: Tensor) -> Tensor:
        """Return one vector per image for the normed tokens (B, P + N, D); default: as the encoder pools."""
        vectors: Tensor = type(encoder).forward_head(encoder, x, pre_logits=True)
        return vectors

    def head_input(self, encoder: Encoder, x: Tensor) -> Tensor:
        """Return what the head reads; default: the features."""
        return self.features(encoder, x)

    def merge_into(self, encoder: Encoder) -> None:
        """Write this into the encoder's own weights, for good.

        Raises:
            UsageError: It cannot be expressed in them.
        """
        raise UsageError(f"{type(self).__name__} cannot be merged into the encoder's weights; keep it as an adapter")

    def stored_state(self) -> dict[str, Tensor]:
        """Return the tensors that make up this insertion, head and running statistics included."""
        return dict(self.state_dict())

    def load_stored_state(self, state: dict[str, Tensor]) -> None:
        """Take the tensors of `stored_state`; names and shapes were checked against it."""
        self.load_state_dict(state, strict=False)

    def trainable_parameters(self) -> int:
        """Return the number of parameters that train."""
        stored = self.stored_state()
        return sum(p.numel() for name, p in self.named_parameters() if p.requires_grad and name in stored)

    @classmethod
    def check(cls, encoder: Encoder) -> None:
        """Refuse an encoder that this cannot be inserted into.

        Raises:
            UsageError: Names the kind of module or block.
        """
        check_family(encoder, mlp_branch=cls.needs_mlp_branch)

    # What puts it there.

    @property
    def attached(self) -> bool:
        """Whether it acts on an encoder now."""
        return bool(self._owner)

    @property
    def encoder(self) -> Encoder:
        """The encoder it acts on."""
        return self._owner[0]

    def attach(self, encoder: Encoder) -> None:
        """Act on an encoder from now on."""
        self._owner = (encoder,)
        self._place = place_of(encoder)
        counts = self.token_counts or [0] * depth(encoder)
        last = depth(encoder) - 1
        for number, block in enumerate(encoder.blocks):
            if counts[number]:
                hook = partial(self._before_block, number)
                self._undo.append(block.register_forward_pre_hook(hook, with_kwargs=True))
                self._make_room(encoder, block, counts[number])
            if number in self.branches:
                if self.branch_input == "residual":
                    self._undo.append(block.norm2.register_forward_pre_hook(partial(self._before_norm, number)))
                else:
                    self._undo.append(block.norm2.register_forward_hook(partial(self._after_norm, number)))
            if number in self.updates:
                self._undo.append(block.drop_path2.register_forward_hook(partial(self._after_update, number)))
            drops = bool(counts[number]) and (not self.carried or number == last)
            if drops or number in self.branches:
                self._undo.append(block.register_forward_hook(partial(self._after_block, number, drops)))
            if counts[number] and not drops:
                self._set(block, "carried_tokens", counts[number])
        for target, name, value in self.replacements(encoder):
            self._set(target, name, value)
        self._set(encoder, "forward_head", self._forward_head)

    def detach(self) -> None:
        """Stop acting; everything on the encoder is as it was before `attach`."""
        # What stood aside did not hear of a move of the encoder to another device or number format in the meantime.
        now = place_of(self.encoder)
        moved = now != self._place
        while self._undo:
            entry = self._undo.pop()
            if isinstance(entry, tuple):
                target, name, before = entry
                if moved and isinstance(before, nn.Module):
                    before.to(*now)
                elif moved and isinstance(before, nn.Parameter):
                    before.data = before.data.to(*now)
                if before is MISSING:
                    delattr(target, name)
                else:
                    setattr(target, name, before)
            else:
                entry.remove()
        self._owner = ()
        self._residual.clear()
        self.prompt_outputs = None

    def _set(self, target: Any, name: str, value: Any) -> None:
        members = {**vars(target), **getattr(target, "_parameters", {}), **getattr(target, "_modules", {})}
        self._undo.append((target, name, members.get(name, MISSING)))
        setattr(target, name, value)

    def _make_room(self, encoder: Encoder, block: Any, count: int) -> None:
        """Prepare a block's attention for more tokens in front: they have no place in the image."""
        self._set(block, "extra_tokens", count)
        attention: Any = getattr(block, "attn", None)
        if hasattr(attention, "num_prefix_tokens"):  # rotary positions begin behind these
            self._set(attention, "num_prefix_tokens", attention.num_prefix_tokens + count)
        if getattr(attention, "relative_position_bias_table", None) is not None:
            self._set(attention, "_get_rel_pos_bias", partial(_padded_table, attention, count))

    def _before_block(self, number: int, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x, count = args[0], self.token_counts[number]
        if kwargs.get("attn_mask") is not None:
            raise UsageError("an attention mask and inserted tokens do not go together; leave the mask out")
        if kwargs.get("shared_rel_pos_bias") is not None:
            kwargs = {**kwargs, "shared_rel_pos_bias": F.pad(kwargs["shared_rel_pos_bias"], (count, 0, count, 0))}
        if number == 0 or not self.carried:
            x = torch.cat([self.new_tokens(number, x).to(x.dtype), x], dim=1)
        return (x, *args[1:]), kwargs

    # The residual stream is kept from `norm2` to the end of the same block's call and no longer; a recomputation
    # (gradient checkpointing) goes through both hooks again.

    def _before_norm(self, number: int, norm: nn.Module, args: tuple[Any, ...]) -> None:
        self._residual[number] = args[0]

    def _after_norm(self, number: int, norm: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self._residual[number] = output

    def _after_update(self, number: int, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return self.update(number, output)

    def _after_block(self, number: int, drops: bool, block: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
        if number in self.branches:
            output = output + self.branch(number, self._residual.pop(number))
        if drops:
            count = self.token_counts[number]
            if number == len(self.token_counts) - 1:
                self.prompt_outputs = output[:, :count]
            output = output[:, count:]
        return output

    def _forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        if pre_logits or self.head is None:
            return self.features(self.encoder, x)
        logits: Tensor = self.head(self.head_input(self.encoder, x))
        return logits


def insert(encoder: Encoder, insertion: Insertion, name: str = "adapter", *, activate_it: bool = True) -> None:
    """Add an insertion to an encoder, whose own parameters are frozen from now on.

    Args:
        encoder: The encoder.
        insertion: Made for this encoder; it becomes a part of it (device, mode and number format follow).
        name: What it is called there.
        activate_it: Let it act at once.

    Raises:
        UsageError: The encoder is of another kind, the name is taken, or the insertion is there already.
    """
    insertion.check(encoder)
    attached = insertions(encoder)
    if name in attached:
        raise UsageError(f"there is an adapter {name!r} on this encoder already; remove it first, or use another name")
    if any(one is insertion for one in attached.values()) or insertion.attached:
        raise UsageError(f"this adapter is on an encoder already; remove it before it is added as {name!r}")
    if not name or "." in name or hasattr(nn.ModuleDict, name):
        raise UsageError(f"{name!r} cannot be the name of an adapter; use letters, digits, dashes and underscores")
    if not attached:
        encoder.trained_before_adapters = [n for n, p in encoder.named_parameters() if p.requires_grad]
        encoder.requires_grad_(False)
        encoder.adapters = nn.ModuleDict()
        encoder.active_adapter = None
    device = next(encoder.parameters()).device
    encoder.adapters[name] = insertion.to(device).train(encoder.training)
    if activate_it:
        activate(encoder, name)


def activate(encoder: Encoder, name: str | None) -> None:
    """Let the insertion of a name act and no other; None: none, the encoder is plain.

    Raises:
        UsageError: There is no insertion of that name.
    """
    attached = insertions(encoder)
    if name is not None and name not in attached:
        raise unknown_name("adapter", name, attached)
    before = active(encoder)
    if before == name:
        return
    if before is not None:
        attached[before].detach()
    if attached:
        encoder.active_adapter = name
    if name is not None:
        attached[name].attach(encoder)


def remove(encoder: Encoder, name: str | None = None) -> None:
    """Take an insertion off the encoder; default: all of them.

    Raises:
        UsageError: There is no insertion of that name.
    """
    attached = insertions(encoder)
    if name is not None and name not in attached:
        raise unknown_name("adapter", name, attached)
    for one in [name] if name is not None else list(attached):
        if active(encoder) == one:
            activate(encoder, None)
        del encoder.adapters[one]
    if attached and not insertions(encoder):
        trained = set(encoder.trained_before_adapters)
        del encoder.adapters, encoder.active_adapter, encoder.trained_before_adapters
        for parameter_name, parameter in encoder.named_parameters():
            parameter.requires_grad_(parameter_name in trained)


def insertions(encoder: Encoder) -> dict[str, Insertion]:
    """Return the insertions on an encoder by name, active or not."""
    attached: Any = getattr(encoder, "adapters", None)
    insertions_by_name: dict[str, Insertion] = (
        dict(cast(Any, attached).items()) if isinstance(attached, nn.ModuleDict) else {}
    )
    return insertions_by_name


def active(encoder: Encoder) -> str | None:
    """Return the name of the insertion that acts on an encoder, or None."""
    name: str | None = getattr(encoder, "active_adapter", None)
    return name


def merge(encoder: Encoder, name: str | None = None) -> None:
    """Write an insertion into the encoder's own weights, head included, and remove it; default: the active one.

    Raises:
        UsageError: There is none of that name, or its mathematics do not allow it.
    """
    attached = insertions(encoder)
    chosen = active(encoder) if name is None else name
    if chosen is None or chosen not in attached:
        raise unknown_name("adapter", str(chosen), attached)
    insertion = attached[chosen]
    head: Any = insertion.head
    if not insertion.mergeable:
        insertion.merge_into(encoder)  # says why not
    if head is not None and hasattr(head, "folded"):
        head = head.folded()
    if head is not None and not isinstance(head, nn.Linear):
        raise UsageError(f"the head of {chosen!r} is a {type(head).__name__}, which timm's classifier cannot express")
    activate(encoder, None)
    insertion.merge_into(encoder)
    remove(encoder, chosen)
    if head is not None:
        encoder.reset_classifier(head.out_features)
        encoder.head.load_state_dict(head.state_dict())
        if hasattr(encoder, "patchloom_args"):
            creation_args = encoder.patchloom_args
            arguments = {**creation_args["model_args"], "num_classes": head.out_features}
            encoder.patchloom_args = {**creation_args, "model_args": arguments}


@contextmanager
def plain(encoder: Encoder) -> Iterator[Encoder]:
    """Let the encoder be plain for a while, whatever is on it."""
    before = active(encoder)
    activate(encoder, None)
    try:
        yield encoder
    finally:
        activate(encoder, before)


def serve(encoder: Encoder, images: Tensor, names: Sequence[str | None]) -> list[Tensor]:
    """Return the output for every image of a batch, each with an adapter of its own.

    Images of one adapter go through the encoder together; the encoder is left with the adapter it had.

    Args:
        encoder: With its adapters inserted.
        images: (B, C, H, W), normalised.
        names: Adapter of each image; None: the plain encoder.

    Returns:
        B tensors, what the encoder gives with the adapter: (classes,) logits.

    Raises:
        UsageError: An unknown adapter, or another number of names than images.
    """
    if len(names) != len(images):
        raise UsageError(f"{len(images)} images and {len(names)} adapter names; give one name for each image")
    attached = insertions(encoder)
    for name in names:
        if name is not None and name not in attached:
            raise unknown_name("adapter", name, attached)
    outputs: list[Tensor] = [images] * len(images)
    before = active(encoder)
    # Those of the adapter that is active already go first: one switch less.
    groups = sorted(dict.fromkeys(names), key=lambda name: name != before)
    try:
        for name in groups:
            rows = [row for row, each in enumerate(names) if each == name]
            activate(encoder, name)
            for row, output in zip(rows, encoder(images[rows]), strict=True):
                outputs[row] = output
    finally:
        activate(encoder, before)
    return outputs


def check_family(encoder: Encoder, mlp_branch: bool = False) -> None:
    """Refuse encoders that nothing can be inserted into.

    Args:
        encoder: The module.
        mlp_branch: A branch beside the MLP is wanted, so the residual stream has to pass `norm2` between attention
            and MLP.

    Raises:
        UsageError: Names the kind of module or block.
    """
    if not has_tokens(encoder):
        raise UsageError(f"adapters are for encoders, {KINDS}; a {type(encoder).__name__} is none of them")
    for block in encoder.blocks:
        kind = type(block).__name__
        # Post-norm blocks have a norm2 too, behind the MLP; blocks with both side by side have nothing between them.
        refused = any(word in kind for word in ("Post", "Parallel")) or not hasattr(block, "norm2")
        if mlp_branch and refused:
            raise UsageError(
                f"the encoder's blocks are {kind}: there is no residual stream between attention and a pre-norm MLP "
                f"to read; use lora, bitfit or vpt"
            )


def place_of(encoder: Encoder) -> tuple[torch.device, torch.dtype]:
    """Return the device and the number format of an encoder, by its first parameter."""
    parameter = next(encoder.parameters())
    return parameter.device, parameter.dtype


def _padded_table(attention: Any, count: int) -> Tensor:
    """Return a block's own relative-position bias with zeros for tokens in front."""
    return F.pad(type(attention)._get_rel_pos_bias(attention), (count, 0, count, 0))
