"""The part of an insertion that reads the encoder: pooling and the classifier."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, ClassVar

from torch import nn

from patchloom.base.ranges import PositiveInt, checked
from patchloom.encoders import Encoder
from patchloom.encoders.heads import NormalizedLinearHead, Pool, PoolNorm, needs_pool_norm, pool_replacements
from patchloom.encoders.insertion import Replacement
from patchloom.errors import UsageError


class Readout:
    """Mixed into an `Insertion`: a pooled feature and a classifier behind a batch norm.

    Attributes:
        kind: Name of the method in files.
        arguments: What rebuilds the insertion beside the encoder; plain values.
        pool: What the classifier reads.
        pool_norm: The norm behind mean pooling, where the encoder has none; or that trains in place of the encoder's.
    """

    kind: ClassVar[str]
    arguments: dict[str, Any]
    head: nn.Module | None
    pool: Pool = "auto"
    pool_norm: nn.Module | None
    replaces_norm: bool = False

    @checked
    def make_readout(
        self,
        encoder: Encoder,
        num_classes: PositiveInt | None,
        pool: Pool = "auto",
        train_pool_norm: bool = True,
        own_pool_norm: bool = False,
        batch_norm: bool = True,
    ) -> None:
        """Make the norm and the head.

        Args:
            encoder: What is read.
            num_classes: Outputs of the classifier; None: none.
            pool: What it reads.
            train_pool_norm: Train the norm behind mean pooling, where it is made here.
            own_pool_norm: Make it where the encoder has one too, as a copy that stands in for it.
            batch_norm: Put a batch norm without parameters in front of the classifier.

        Raises:
            UsageError: Fewer than two classes, an unknown pooling, or one the encoder cannot do; a copy of a norm that
                the encoder does not have.
        """
        self.pool = pool
        self.pool_norm = PoolNorm(encoder) if needs_pool_norm(encoder, pool) else None
        self.replaces_norm = own_pool_norm
        if own_pool_norm:
            norm = getattr(encoder, "fc_norm", None)
            if not isinstance(norm, nn.LayerNorm):
                raise UsageError("own_pool_norm copies the norm behind mean pooling, and this encoder has none there")
            self.pool_norm = copy.deepcopy(norm)
        if self.pool_norm is not None:
            self.pool_norm.requires_grad_(train_pool_norm)
        pool_replacements(encoder, pool, self.pool_norm)  # refuses what cannot be
        if num_classes is not None:
            width = feature_width(encoder)
            self.head = NormalizedLinearHead(width, num_classes) if batch_norm else nn.Linear(width, num_classes)

    def replacements(self, encoder: Encoder) -> Iterable[Replacement]:
        """Return what makes the encoder pool as wanted."""
        if self.replaces_norm:
            return [*pool_replacements(encoder, self.pool, None), (encoder, "fc_norm", self.pool_norm)]
        return pool_replacements(encoder, self.pool, self.pool_norm)

    def check_merges(self) -> None:
        """Refuse to merge an insertion that pools in another way than its encoder does.

        Raises:
            UsageError: It does.
        """
        if self.replaces_norm:
            raise UsageError("an adapter with a norm of its own in the encoder's place cannot be merged into weights")
        if self.pool != "auto":
            raise UsageError(
                f"an adapter with pool={self.pool} changes how the encoder pools, which weights cannot hold; "
                f"train it with pool=auto to merge it"
            )


def feature_width(encoder: Encoder) -> int:
    """Return the width of an encoder's pooled feature."""
    return int(getattr(encoder, "head_hidden_size", None) or encoder.num_features)
