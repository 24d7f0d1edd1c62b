"""The layers multiple-instance heads are made of: per-tile networks that padding cannot touch, and gated attention.

The names of their parameters are the published ones (owkin/HistoSSLscaling).

>>> scores = TilesMLP(4, 1, hidden=[8])(torch.zeros(1, 3, 4), torch.tensor([[[False], [False], [True]]]))
>>> scores.shape
torch.Size([1, 3, 1])
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn

from patchloom.errors import UsageError, unknown_name

Activation: TypeAlias = str | nn.Module | type[nn.Module]
ACTIVATIONS: dict[str, type[nn.Module]] = {
    "sigmoid": nn.Sigmoid,
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "gelu": nn.GELU,
}


def make_activation(activation: Activation) -> nn.Module:
    """Return the activation of a name, a class or a module.

    Raises:
        UsageError: Unknown name.
    """
    if isinstance(activation, nn.Module):
        return activation
    if isinstance(activation, type):
        return activation()
    if activation.lower() not in ACTIVATIONS:
        raise unknown_name("activation", activation, ACTIVATIONS)
    return ACTIVATIONS[activation.lower()]()


class MLP(nn.Sequential):
    """Linear, activation and dropout for each hidden width, then a linear layer.

    Args:
        in_features: Width of the input.
        out_features: Width of the output.
        hidden: Hidden widths; none: one linear layer.
        dropout: Dropout rate of each hidden layer.
        activation: Name, class or module.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        hidden: Sequence[int] | None = None,
        dropout: Sequence[float] | None = None,
        activation: Activation = "sigmoid",
    ) -> None:
        hidden = list(hidden or [])
        if dropout is not None and len(dropout) != len(hidden):
            raise UsageError(f"{len(dropout)} dropout rates do not belong to {len(hidden)} hidden layers")
        layers: list[nn.Module] = []
        for number, width in enumerate(hidden):
            parts = [nn.Linear(in_features, width), make_activation(activation)]
            if dropout is not None:
                parts.append(nn.Dropout(dropout[number]))
            layers.append(nn.Sequential(*parts))
            in_features = width
        super().__init__(*layers, nn.Linear(in_features, out_features))


class TilesMLP(nn.Module):
    """A network applied to every tile by itself; hidden activations of padded tiles are zero.

    Args:
        in_features: Width of the input.
        out_features: Width of the output.
        hidden: Hidden widths, each followed by a sigmoid.
        bias: Give the linear layers a bias.
    """

    def __init__(
        self, in_features: int, out_features: int = 1, hidden: Sequence[int] | None = None, bias: bool = True
    ) -> None:
        super().__init__()
        self.hidden_layers = nn.ModuleList()
        for width in hidden or []:
            self.hidden_layers += [nn.Linear(in_features, width, bias=bias), nn.Sigmoid()]
            in_features = width
        self.hidden_layers.append(nn.Linear(in_features, out_features, bias=bias))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return (B, N, out_features); the last layer is not masked, so padded tiles hold its bias there.

        Args:
            x: (B, N, in_features).
            mask: (B, N, 1) bool, True where padded.
        """
        for layer in self.hidden_layers[:-1]:
            x = layer(x)
            # The sigmoid of minus infinity is zero.
            if mask is not None and isinstance(layer, nn.Linear):
                x = x.masked_fill(mask, -torch.inf)
        return self.hidden_layers[-1](x)


class GatedAttention(nn.Module):
    """Gated attention over the tiles of a bag (Ilse et al. 2018, arXiv 1802.04712, equation 9).

    Args:
        d_model: Width of the tiles.
        temperature: Divides the logits; larger spreads the attention.
    """

    def __init__(self, d_model: int, temperature: float = 1.0) -> None:
        super().__init__()
        self.att = nn.Linear(d_model, d_model)
        self.gate = nn.Linear(d_model, d_model)
        self.w = nn.Linear(d_model, 1)
        self.temperature = temperature

    def logits(self, tiles: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return (B, N, 1), minus infinity where padded."""
        logits = self.w(torch.tanh(self.att(tiles)) * torch.sigmoid(self.gate(tiles)))
        return (logits if mask is None else logits.masked_fill(mask, -torch.inf)) / self.temperature

    def forward(self, tiles: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the weighted sum of the tiles (B, d_model) and the weights (B, N, 1), which sum to one.

        Args:
            tiles: (B, N, d_model).
            mask: (B, N, 1) bool, True where padded.
        """
        weights = self.logits(tiles, mask).softmax(1)
        return (weights * tiles).sum(1), weights
