"""What every encoder has, as a type.

Encoders are timm's modules, which share no class of their own and declare little of what they hold, and a protocol
cannot ask for `nn.Module`, which everything that trains, copies or saves an encoder needs. So `Encoder` is a module
that declares what they have in common. The classes that `families.register` makes encoders are virtual subclasses of
it: `isinstance(model, Encoder)` says whether a model is one, and no class of timm is touched.
"""

from __future__ import annotations

from abc import ABCMeta
from typing import Any

from torch import Tensor, nn


class Encoder(nn.Module, metaclass=ABCMeta):
    """An encoder of tokens: a Vision Transformer of timm, or a module of another family that is registered."""

    embed_dim: int
    """Width D of the tokens."""
    num_features: int
    num_classes: int
    num_prefix_tokens: int
    """Class and register tokens in front of the patches."""
    patch_embed: Any
    """Inputs to patches; what it holds is for its family to know."""
    blocks: Any
    """An `nn.ModuleList` of blocks, called as `block(x, **embedded.kwargs_of(number))`."""
    norm: nn.Module
    """Norm of the tokens behind the last block; `Identity` where the encoder norms after pooling."""
    fc_norm: nn.Module
    head: Any
    global_pool: str
    cls_token: Tensor | None
    reg_token: Tensor | None
    pos_embed: Any
    """(1, P + N, D) or (1, N, D), None where positions are not of this sort."""
    grad_checkpointing: bool
    pretrained_cfg: dict[str, Any]
    """How inputs are normalised, and what timm writes there besides."""
    patchloom_args: dict[str, Any]
    """Architecture and arguments it was made from."""
    adapters: nn.ModuleDict
    active_adapter: str | None
    trained_before_adapters: list[str]

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the normed tokens (B, P + N, D)."""
        raise NotImplementedError

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits of tokens, or with `pre_logits` what the classifier would read."""
        raise NotImplementedError

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a fresh classifier in place; none for 0 classes."""
        raise NotImplementedError

    def get_classifier(self) -> nn.Module:
        """Return the classifier."""
        raise NotImplementedError

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks' activations in the backward pass."""
        raise NotImplementedError
