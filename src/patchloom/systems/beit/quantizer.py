"""A table of codes that follows the vectors by moving averages, on the unit sphere (VQ-KD in BEiT v2).

Peng et al. 2022, "BEiT v2: Masked Image Modeling with Vector-Quantized Visual Tokenizers" (arXiv 2208.06366, section
3.1); follows `beit2/norm_ema_quantizer.py` of github.com/microsoft/unilm, whose names of tensors it has.

>>> quantizer = EMAVectorQuantizer(num_codes=16, code_dim=8, kmeans_init=False)
>>> z_q, ids, loss = quantizer(torch.randn(2, 9, 8))
>>> z_q.shape, ids.shape
(torch.Size([2, 9, 8]), torch.Size([2, 9]))
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from patchloom.data.survey import notice
from patchloom.systems.vit_vqgan.quantizer import Quantized, nearest_codes

ITERATIONS = 10
"""Of k-means on the first batch (published)."""


class CodeTable(nn.Module):
    """The codes and what is kept of them; none of it takes gradients."""

    weight: Tensor
    cluster_size: Tensor
    embed_avg: Tensor
    initted: Tensor

    def __init__(self, num_codes: int, code_dim: int, kmeans_init: bool) -> None:
        super().__init__()
        drawn = F.normalize(torch.randn(num_codes, code_dim), dim=-1)
        weight = torch.zeros(num_codes, code_dim) if kmeans_init else drawn
        self.register_buffer("weight", weight)
        self.register_buffer("cluster_size", torch.zeros(num_codes))
        self.register_buffer("embed_avg", weight.clone())  # of published files; nothing reads it
        self.register_buffer("initted", torch.tensor([float(not kmeans_init)]))


class EMAVectorQuantizer(nn.Module):
    """Codes of length 1, and the nearest of them in place of each vector at length 1; in float32 whatever surrounds it.

    While training, each code moves towards the mean of the vectors it took the place of, over all processes; no
    gradient goes to it. Codes that took none stay where they are.

    Args:
        num_codes: K, codes in the table.
        code_dim: d, length of a code.
        beta: Weight of the commitment loss, the only one there is.
        decay: Of the moving averages.
        kmeans_init: Start the codes from k-means over the first batch's vectors; else at random.

    Attributes:
        embedding: The table.
        cluster_size: (K,) moving average of how many vectors of a batch each code took the place of.
        follows: Whether codes move and are counted while training.
        counts_in_eval: Whether they are counted in eval mode as well, as in the published code.
    """

    cluster_size: Tensor

    def __init__(
        self, num_codes: int, code_dim: int, beta: float = 1.0, decay: float = 0.99, kmeans_init: bool = True
    ) -> None:
        super().__init__()
        self.beta, self.decay = beta, decay
        self.embedding = CodeTable(num_codes, code_dim, kmeans_init)
        self.register_buffer("cluster_size", torch.zeros(num_codes))
        self.follows, self.counts_in_eval = True, False

    @property
    def num_codes(self) -> int:
        """K."""
        return len(self.embedding.weight)

    @property
    def code_dim(self) -> int:
        """d."""
        return int(self.embedding.weight.shape[1])

    def extra_repr(self) -> str:
        """Return the settings, for printing."""
        return f"num_codes={self.num_codes}, code_dim={self.code_dim}, beta={self.beta}, decay={self.decay}"

    def forward(self, z: Tensor) -> Quantized:
        """Replace vectors by codes; gradients of the codes go to the vectors, back through their normalisation.

        Args:
            z: (..., d).
        """
        with torch.autocast(z.device.type, enabled=False):
            z = F.normalize(z.float(), dim=-1)
            vectors = z.detach().flatten(0, -2)
            if self.training and self.follows and not self.embedding.initted:
                self._start(vectors)
            ids = nearest_codes(vectors, self.embedding.weight)
            z_q = self.embedding.weight[ids].view_as(z)  # before the table moves
            if self.training and self.follows:
                self._follow(vectors, ids)
            elif self.counts_in_eval and not self.training:
                self._count(ids)
            loss = self.beta * F.mse_loss(z, z_q)
            return Quantized(z + (z_q - z).detach(), ids.view(z.shape[:-1]), loss)

    def lookup(self, ids: Tensor) -> Tensor:
        """Return the codes of ids: (...) → (..., d)."""
        return self.embedding.weight[ids]

    @torch.no_grad()
    def _start(self, vectors: Tensor) -> None:
        """Put the codes where k-means over the first vectors puts them, those of the first process."""
        if len(vectors) < self.num_codes:
            notice(
                f"warning: the first batch has {len(vectors)} patches for {self.num_codes} codes, so some codes start "
                f"alike and may stay unused; raise batch_size, or lower num_codes"
            )
        means, sizes = spherical_kmeans(vectors, self.num_codes)
        if _in_company():
            dist.broadcast(means, 0)
            dist.broadcast(sizes, 0)
        self.embedding.weight.copy_(means)
        self.embedding.cluster_size.copy_(sizes)
        self.embedding.initted.fill_(1)

    @torch.no_grad()
    def _count(self, ids: Tensor) -> Tensor:
        """Return how often each code was taken in all processes, and average it."""
        counts = torch.bincount(ids, minlength=self.num_codes).to(self.cluster_size)
        if _in_company():
            dist.all_reduce(counts)
        self.cluster_size.lerp_(counts, 1 - self.decay)
        return counts

    @torch.no_grad()
    def _follow(self, vectors: Tensor, ids: Tensor) -> None:
        """Move the codes towards the vectors they took the place of."""
        counts, table = self._count(ids), self.embedding.weight
        sums = torch.zeros_like(table).index_add_(0, ids, vectors)
        if _in_company():
            dist.all_reduce(sums)
        means = F.normalize(sums / counts.clamp(min=1)[:, None], dim=-1)
        means = torch.where(counts[:, None] == 0, table, means)
        table.copy_(F.normalize(self.decay * table + (1 - self.decay) * means, dim=-1))


def spherical_kmeans(vectors: Tensor, num_codes: int, iterations: int = ITERATIONS) -> tuple[Tensor, Tensor]:
    """Return means of length 1 by cosine, (K, d), and how many vectors each has, (K,) float.

    Args:
        vectors: (n, d) of length 1; fewer than K are drawn several times.
        num_codes: K.
        iterations: How often means are made anew; those without vectors stay.
    """
    count = len(vectors)
    drawn = torch.randperm(count)[:num_codes] if count >= num_codes else torch.randint(count, (num_codes,))
    means = vectors[drawn.to(vectors.device)].clone()
    sizes = torch.zeros(num_codes, device=vectors.device)
    for _ in range(iterations):
        nearest = nearest_codes(vectors, means)
        sizes = torch.bincount(nearest, minlength=num_codes).to(means)
        sums = torch.zeros_like(means).index_add_(0, nearest, vectors)
        moved = F.normalize(sums / sizes.clamp(min=1)[:, None], dim=-1)
        means = torch.where(sizes[:, None] == 0, means, moved)
    return means, sizes


def _in_company() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
