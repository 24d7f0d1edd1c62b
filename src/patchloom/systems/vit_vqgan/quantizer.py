"""Vector quantisation with factorised, l2-normalised codes (Yu et al. 2022, arXiv 2110.04627, section 3.2).

A vector and the codes are compared on the unit sphere; the nearest code takes the vector's place. Follows the published
re-implementation github.com/thuanz123/enhancing-transformers (`modules/stage1/quantizers.py`).

>>> quantizer = VectorQuantizer(num_codes=16, code_dim=8)
>>> z_q, ids, loss = quantizer(torch.randn(2, 9, 8))
>>> z_q.shape, ids.shape
(torch.Size([2, 9, 8]), torch.Size([2, 9]))
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchloom.errors import UsageError

Kind = Literal["nearest", "gumbel"]


class Quantized(NamedTuple):
    """What comes out of a quantiser."""

    z_q: Tensor
    """(..., d) codes in place of the vectors; gradients go to the vectors as they came in."""
    ids: Tensor
    """(...) int64 which codes; (..., M) of M levels."""
    loss: Tensor
    """Scalar: codebook and commitment loss, or of gumbel the divergence from using all codes alike."""


class VectorQuantizer(nn.Module):
    """A table of codes, and the nearest of them in place of each vector, in float32 whatever surrounds it.

    Args:
        num_codes: K, codes in the table.
        code_dim: d, length of a code.
        beta: Weight of the commitment loss.
        l2_normalize: Compare, and give back, vectors and codes of length 1 (the table itself stays as it is).
        num_residual: M; above 1, what a code leaves is quantised again by the same table, M times in all.
        detach_residual: As published, the levels see the vector without its gradient, so that the commitment loss does
            not reach the encoder.
        kind: nearest, or gumbel: codes are drawn by distance while training (Jang et al. 2017, arXiv 1611.01144).
        temperature: Of gumbel.

    Attributes:
        embedding: The table.
    """

    def __init__(
        self,
        num_codes: int,
        code_dim: int,
        beta: float = 0.25,
        l2_normalize: bool = True,
        num_residual: int = 1,
        detach_residual: bool = False,
        kind: Kind = "nearest",
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        self.beta, self.l2_normalize = beta, l2_normalize
        self.num_residual, self.detach_residual = num_residual, detach_residual
        self.kind, self.temperature = kind, temperature
        self.embedding = nn.Embedding(num_codes, code_dim)  # drawn from N(0, 1), as published

    @property
    def num_codes(self) -> int:
        """K."""
        return self.embedding.num_embeddings

    def extra_repr(self) -> str:
        """Return the settings, for printing."""
        return f"l2_normalize={self.l2_normalize}, num_residual={self.num_residual}, kind={self.kind}"

    def forward(self, z: Tensor) -> Quantized:
        """Replace vectors by codes.

        Args:
            z: (..., d).
        """
        with torch.autocast(z.device.type, enabled=False):
            z = z.float()
            if self.num_residual == 1:
                z_q, ids, loss = self._quantize(z)
            else:
                z_q, ids, loss = self._quantize_residual(z)
            # A soft choice has a gradient of its own.
            out = z_q if self.kind == "gumbel" else z + (z_q - z).detach()
        return Quantized(out, ids, loss)

    def lookup(self, ids: Tensor) -> Tensor:
        """Return the codes of ids: (...) → (..., d); of several levels their sum, (..., M) → (..., d)."""
        codes = self._normed(self.embedding(ids).float())
        return codes.sum(-2) if self.num_residual > 1 else codes

    def _normed(self, vectors: Tensor) -> Tensor:
        return F.normalize(vectors, dim=-1) if self.l2_normalize else vectors

    def _quantize(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        normed, codes = self._normed(z), self._normed(self.embedding.weight.float())
        if self.kind == "gumbel":
            return self._drawn(normed, codes)
        ids = nearest_codes(normed.detach(), codes.detach())
        z_q = F.embedding(ids, codes)
        loss = self.beta * F.mse_loss(normed, z_q.detach()) + F.mse_loss(z_q, normed.detach())
        return z_q, ids, loss

    def _drawn(self, normed: Tensor, codes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = -squared_distances(normed, codes)
        # In eval mode the nearest code itself; nothing is drawn.
        shares = (
            F.gumbel_softmax(logits, tau=self.temperature, dim=-1)
            if self.training
            else F.one_hot(logits.argmax(-1), len(codes)).to(logits)
        )
        log_shares = logits.log_softmax(-1)
        divergence = (log_shares.exp() * (log_shares + math.log(len(codes)))).sum(-1).mean()
        return shares @ codes, shares.argmax(-1), divergence

    def _quantize_residual(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rest = z.detach() if self.detach_residual else z
        total, ids, losses = torch.zeros_like(z), [], []
        for _ in range(self.num_residual):
            z_q, found, loss = self._quantize(rest)
            # Gradients of a level go to the vector, not through the levels before it.
            rest = rest - z_q.detach()
            total = total + z_q
            ids.append(found)
            losses.append(loss)
        return total, torch.stack(ids, -1), torch.stack(losses).mean()


def squared_distances(vectors: Tensor, codes: Tensor) -> Tensor:
    """Return (..., K), the squared distance of each vector (..., d) to each code (K, d)."""
    return vectors.square().sum(-1, keepdim=True) + codes.square().sum(-1) - 2 * vectors @ codes.T


@torch.no_grad()
def nearest_codes(vectors: Tensor, codes: Tensor) -> Tensor:
    """Return (...) int64, the nearest code (K, d) of each vector (..., d); of equals the lowest."""
    flat = vectors.reshape(-1, vectors.shape[-1])
    half = codes.square().sum(-1) / 2
    # The square of the vector is the same for all codes; a slice at a time, so that K distances of few are held.
    ids = [torch.addmm(half, part, codes.T, alpha=-1).argmin(-1) for part in flat.split(max(2**24 // len(codes), 1))]
    return torch.cat(ids).view(vectors.shape[:-1])


def check_levels(num_residual: int) -> None:
    """Refuse tokens of several levels where one token a patch is asked for.

    Raises:
        UsageError: There is more than one level.
    """
    if num_residual > 1:
        raise UsageError(
            f"this tokenizer has {num_residual} tokens a patch (num_residual), and what takes tokens takes one; train "
            f"it with num_residual=1"
        )
