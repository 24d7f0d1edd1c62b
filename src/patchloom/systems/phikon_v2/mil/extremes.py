"""Heads that look for the most telling tiles: Chowder and DSMIL.

Courtiol et al., "Classification and disease localization in histopathology using only global labels", arXiv
1802.02212; Li et al., "Dual-stream multiple instance learning network", arXiv 2011.08939. Both as the
published code of Phikon-v2's group (owkin/HistoSSLscaling) runs them.

>>> Chowder(16, n_top=2, n_bottom=2)(torch.zeros(2, 5, 16)).shape
torch.Size([2, 1])
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from patchloom.errors import UsageError, unknown_name
from patchloom.systems.phikon_v2.mil.base import MILHead
from patchloom.systems.phikon_v2.mil.layers import MLP, Activation, TilesMLP

Logits = Literal["mean", "bag", "max"]


class Chowder(MILHead):
    """A classifier of the highest and the lowest scores among the tiles.

    Args:
        in_features: Width of the tile features.
        out_features: Logits per bag; each has a score of its own, and they share the classifier.
        n_top: Highest scores that count.
        n_bottom: Lowest scores that count.
        tiles_mlp_hidden: Hidden widths of the score; none: linear.
        mlp_hidden: Hidden widths of the classifier; none: linear.
        mlp_dropout: Its dropout rates.
        mlp_activation: Its activation.
        bias: Bias of the score.
        metadata_cols: Columns in front of the features.

    Raises:
        UsageError: Neither top nor bottom scores are to count.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int = 1,
        n_top: int = 10,
        n_bottom: int = 10,
        tiles_mlp_hidden: Sequence[int] | None = (128,),
        mlp_hidden: Sequence[int] | None = (128, 64),
        mlp_dropout: Sequence[float] | None = None,
        mlp_activation: Activation = "sigmoid",
        bias: bool = True,
        metadata_cols: int = 0,
    ) -> None:
        super().__init__(in_features, out_features, metadata_cols)
        if min(n_top, n_bottom) < 0 or n_top + n_bottom < 1:
            raise UsageError(f"n_top is {n_top} and n_bottom {n_bottom}; at least one of them must be above 0")
        self.n_top, self.n_bottom = n_top, n_bottom
        self.min_tiles = max(n_top, n_bottom)
        self.score_model = TilesMLP(in_features, out_features, tiles_mlp_hidden, bias)
        self.mlp = MLP(n_top + n_bottom, 1, mlp_hidden, mlp_dropout, mlp_activation)
        self.apply(_xavier)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return logits (B, out_features), see `MILHead.forward`; a bag of fewer tiles than scores has zeros for them.

        Raises:
            UsageError: Also for a tensor shorter than the scores asked for.
        """
        x, mask = self.checked(x, mask)
        if x.shape[1] < self.min_tiles:
            raise UsageError(
                f"a bag of {x.shape[1]} tiles has no {self.min_tiles} extreme ones; pad it (pad_bags with min_tiles), "
                f"or set n_top and n_bottom lower"
            )
        extremes = self._extremes(self.score_model(x, mask), mask)
        return self.mlp(extremes.transpose(1, 2)).squeeze(2)

    def tile_scores(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the score of the last class, (B, N), turned so that higher ones raise the logit."""
        x, mask = self.checked(x, mask)
        scores = self.score_model(x, mask)[..., -1:]
        extremes = self._extremes(scores, mask).transpose(1, 2)
        # The classifier decides which way scores point; a small step of all of them tells.
        step = 0.1 * extremes.std(2, keepdim=True) + 1e-6
        raised = self.mlp(extremes + step) >= self.mlp(extremes)
        return torch.where(raised, scores, -scores).squeeze(-1)

    def _extremes(self, scores: Tensor, mask: Tensor | None) -> Tensor:
        """Return the highest and the lowest scores, (B, n_top + n_bottom, classes)."""
        extremes = []
        if self.n_top:
            extremes.append(self._extreme(scores, mask, self.n_top, largest=True))
        if self.n_bottom:
            extremes.append(self._extreme(scores, mask, self.n_bottom, largest=False))
        return torch.cat(extremes, 1)

    @staticmethod
    def _extreme(scores: Tensor, mask: Tensor | None, count: int, largest: bool) -> Tensor:
        """Return (B, count, classes): the most extreme first, zeros where padding came in."""
        if mask is None:
            return scores.topk(count, dim=1, largest=largest).values
        worst = -torch.inf if largest else torch.inf
        extreme = scores.masked_fill(mask, worst).topk(count, dim=1, largest=largest).values
        padded = extreme == worst
        if bool(padded.any()):
            warnings.warn(f"a bag has fewer than {count} tiles; zeros stand for the missing scores", stacklevel=3)
        return extreme.masked_fill(padded, 0)


class DSMIL(MILHead):
    """Two streams: the highest score, and a pooling by likeness to the tile that has it.

    With several classes each has its own critical tile and pooling, and they share the classifier of the second
    stream; the published code takes one class only.

    Args:
        in_features: Width of the tile features.
        out_features: Logits per bag.
        d_tiles_values: Width of the values, with `passing_values`.
        d_tiles_queries: Width of the queries.
        passing_values: Pool learnt values instead of the features themselves.
        tiles_scores_mlp_hidden: Hidden widths of the score.
        tiles_values_mlp_hidden: Hidden widths of the values.
        tiles_queries_mlp_hidden: Hidden widths of the queries.
        mlp_hidden: Hidden widths of the second stream's classifier.
        mlp_dropout: Its dropout rates.
        mlp_activation: Its activation.
        bias: Bias of the networks on tiles.
        metadata_cols: Columns in front of the features.
        out_logits: What is returned: the mean of both streams, the second (bag), or the first (max).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int = 1,
        d_tiles_values: int = 32,
        d_tiles_queries: int = 32,
        passing_values: bool = False,
        tiles_scores_mlp_hidden: Sequence[int] | None = (200, 100),
        tiles_values_mlp_hidden: Sequence[int] | None = None,
        tiles_queries_mlp_hidden: Sequence[int] | None = (200, 100),
        mlp_hidden: Sequence[int] | None = (200, 100),
        mlp_dropout: Sequence[float] | None = None,
        mlp_activation: Activation = "sigmoid",
        bias: bool = True,
        metadata_cols: int = 0,
        out_logits: Logits = "mean",
    ) -> None:
        super().__init__(in_features, out_features, metadata_cols)
        if out_logits not in get_args(Logits):
            raise unknown_name("out_logits", out_logits, get_args(Logits))
        self.out_logits = out_logits
        self.passing_values = passing_values
        self.tiles_scores = TilesMLP(in_features, out_features, tiles_scores_mlp_hidden, bias)
        # Published checkpoints hold it even where it is not used.
        self.tiles_values = TilesMLP(in_features, d_tiles_values, tiles_values_mlp_hidden, bias)
        self.tiles_queries = TilesMLP(in_features, d_tiles_queries, tiles_queries_mlp_hidden, bias)
        self.mlp = MLP(d_tiles_values if passing_values else in_features, 1, mlp_hidden, mlp_dropout, mlp_activation)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return logits (B, out_features), see `MILHead.forward`."""
        x, mask = self.checked(x, mask)
        highest, weights = self._streams(x, mask)
        values = self.tiles_values(x, mask) if self.passing_values else x
        bag = self.mlp(weights.transpose(1, 2) @ values).squeeze(2)
        if self.out_logits == "mean":
            return 0.5 * (highest + bag)
        return bag if self.out_logits == "bag" else highest

    def attention(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the weight of each tile for each class, (B, N, out_features)."""
        return self._streams(*self.checked(x, mask))[1]

    def tile_scores(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the attention for the last class, (B, N)."""
        return self.attention(x, mask)[..., -1]

    def _streams(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the highest score (B, C) and the attention (B, N, C)."""
        scores = self.tiles_scores(x, mask)
        if mask is not None:
            scores = scores.masked_fill(mask, -torch.inf)
        highest, critical = scores.max(1)
        queries = self.tiles_queries(x, mask)
        chosen = queries.gather(1, critical.unsqueeze(-1).expand(-1, -1, queries.shape[2]))
        likeness = queries @ chosen.transpose(1, 2)
        if mask is not None:
            likeness = likeness.masked_fill(mask, -torch.inf)
        return highest, likeness.softmax(1)


def _xavier(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
