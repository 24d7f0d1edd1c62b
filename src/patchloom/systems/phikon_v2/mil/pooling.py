"""Heads that average: plainly (MeanPool), or by learnt attention (ABMIL).

Ilse et al., "Attention-based deep multiple instance learning", arXiv 1802.04712, as the published code
of Phikon-v2's group (owkin/HistoSSLscaling) runs it.

>>> import torch
>>> ABMIL(16)(torch.zeros(2, 5, 16)).shape
torch.Size([2, 1])
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from patchloom.systems.phikon_v2.mil.base import MILHead
from patchloom.systems.phikon_v2.mil.layers import MLP, Activation, GatedAttention, TilesMLP


class MeanPool(MILHead):
    """A classifier of the mean over the tiles.

    Args:
        in_features: Width of the tile features.
        out_features: Logits per bag.
        hidden: Hidden widths of the classifier; none: linear.
        dropout: Its dropout rates.
        activation: Its activation.
        metadata_cols: Columns in front of the features.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int = 1,
        hidden: Sequence[int] | None = None,
        dropout: Sequence[float] | None = None,
        activation: Activation = "sigmoid",
        metadata_cols: int = 0,
    ) -> None:
        super().__init__(in_features, out_features, metadata_cols)
        self.mlp = MLP(in_features, out_features, hidden, dropout, activation)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return logits (B, out_features), see `MILHead.forward`."""
        x, mask = self.checked(x, mask)
        if mask is None:
            return self.mlp(x.mean(1))
        return self.mlp(x.masked_fill(mask, 0).sum(1) / (~mask).sum(1))

    def tile_scores(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the last logit of each tile by itself, (B, N): for a linear classifier, its share of the slide's."""
        x, _ = self.checked(x, mask)
        return self.mlp(x)[..., -1]


class ABMIL(MILHead):
    """Gated attention over embedded tiles, and a classifier of their weighted sum.

    Args:
        in_features: Width of the tile features.
        out_features: Logits per bag.
        d_model_attention: Width of the embedded tiles.
        temperature: Divides the attention logits.
        tiles_mlp_hidden: Hidden widths of the embedding; none: linear.
        mlp_hidden: Hidden widths of the classifier; none: linear.
        mlp_dropout: Its dropout rates.
        mlp_activation: Its activation.
        bias: Bias of the embedding.
        metadata_cols: Columns in front of the features.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int = 1,
        d_model_attention: int = 128,
        temperature: float = 1.0,
        tiles_mlp_hidden: Sequence[int] | None = None,
        mlp_hidden: Sequence[int] | None = (128, 64),
        mlp_dropout: Sequence[float] | None = None,
        mlp_activation: Activation = "relu",
        bias: bool = True,
        metadata_cols: int = 0,
    ) -> None:
        super().__init__(in_features, out_features, metadata_cols)
        self.tiles_emb = TilesMLP(in_features, d_model_attention, tiles_mlp_hidden, bias)
        self.attention_layer = GatedAttention(d_model_attention, temperature)
        self.mlp = MLP(d_model_attention, out_features, mlp_hidden, mlp_dropout, mlp_activation)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return logits (B, out_features), see `MILHead.forward`."""
        x, mask = self.checked(x, mask)
        return self.mlp(self.attention_layer(self.tiles_emb(x, mask), mask)[0])

    def attention(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the weight of each tile, (B, N); they sum to one over the tiles of a bag."""
        x, mask = self.checked(x, mask)
        return self.attention_layer(self.tiles_emb(x, mask), mask)[1].squeeze(-1)

    def tile_scores(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the attention, (B, N)."""
        return self.attention(x, mask)
