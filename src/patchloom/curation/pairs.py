"""Near-duplicates: pairs above a similarity, the groups they form, and whom to keep of each.

All pairs are compared block by block, each once; of the pairs found no more are held than tie the images together, so
that memory is bounded however many copies there are.

>>> vectors = torch.tensor([[1.0, 0.0], [0.999, 0.01], [0.0, 1.0]])
>>> groups_of(vectors, 0.95)
[array([0, 1])]
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from patchloom.base.progress import Meter

BLOCK = 4096
"""Vectors compared with as many at a time."""


@torch.no_grad()
def groups_of(vectors: Tensor, threshold: float, device: torch.device | str = "cpu") -> list[np.ndarray]:
    """Return groups of two and more that chains of pairs tie together, each ascending, the largest first.

    Args:
        vectors: (n, d).
        threshold: Cosine similarity from which on two are a pair.
        device: Where to compare.
    """
    count = len(vectors)
    unit = F.normalize(vectors.float(), dim=1)
    group = np.arange(count)
    starts = range(0, count, BLOCK)
    blocks = len(starts) * (len(starts) + 1) // 2
    meter, done = Meter("comparing", blocks, unit=None), 0
    for at in starts:
        rows = unit[at : at + BLOCK].to(device)
        firsts, seconds = [], []
        for start in starts[at // BLOCK :]:
            columns = rows if start == at else unit[start : start + BLOCK].to(device)
            similar = rows @ columns.T
            # Cheap where there is nothing to be found, which is nearly everywhere.
            if float(similar.max()) >= threshold or start == at:
                first, second = (similar >= threshold).nonzero(as_tuple=True)
                later = first + at < second + start
                firsts.append((first[later] + at).cpu().numpy())
                seconds.append((second[later] + start).cpu().numpy())
            done += 1
            meter.reach(done)
        ones, others = np.concatenate(firsts), np.concatenate(seconds)
        if len(ones):
            # What is tied already counts as one from here on. Ties that come twice are or-ed: sums would overflow.
            ties = coo_array((np.ones(len(ones), np.bool_), (group[ones], group[others])), shape=(count, count))
            group = connected_components(ties, directed=False)[1][group]
    meter.close()
    order = np.argsort(group, kind="stable")
    parts = np.split(order, np.flatnonzero(np.diff(group[order])) + 1) if count else []
    return sorted((np.sort(part) for part in parts if len(part) > 1), key=lambda part: (-len(part), part[0]))


def kept_of(vectors: Tensor, group: np.ndarray, rank: Sequence[float] | np.ndarray, threshold: float) -> dict[int, int]:
    """Return, for every image of a group that may go, the one that is kept in its place.

    The best are kept first; an image goes only where it is itself close to one that is kept, so that a chain of small
    steps is not reduced to one end of it.

    Args:
        vectors: (n, d) of all images.
        group: Numbers of some of them.
        rank: (n,) the higher the better; among equals the first is kept.
        threshold: Cosine similarity from which on two are a pair.
    """
    order = sorted(group.tolist(), key=lambda number: (-rank[number], number))
    unit = F.normalize(vectors[order].float(), dim=1)
    kept: list[int] = []
    gone: dict[int, int] = {}
    for place, number in enumerate(order):
        similar = unit[kept] @ unit[place] if kept else torch.zeros(1)
        best = int(similar.argmax())
        if kept and float(similar[best]) >= threshold:
            gone[number] = order[kept[best]]
        else:
            kept.append(place)
    return gone


@torch.no_grad()
def leaks(
    vectors: Tensor, others: Tensor, threshold: float, device: torch.device | str = "cpu"
) -> list[tuple[int, int, float]]:
    """Return (image, other, similarity) of each image with a copy among others: the most similar; the closest first.

    Args:
        vectors: (n, d).
        others: (m, d).
        threshold: Cosine similarity from which on two are a pair.
        device: Where to compare.
    """
    unit = F.normalize(others.float(), dim=1).to(device)
    found: list[tuple[int, int, float]] = []
    for at in range(0, len(vectors), BLOCK):
        rows = F.normalize(vectors[at : at + BLOCK].float(), dim=1).to(device)
        best = torch.full((len(rows),), -2.0, device=rows.device)
        which = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
        for start in range(0, len(unit), BLOCK):
            values, numbers = (rows @ unit[start : start + BLOCK].T).max(1)
            better = values > best
            best, which = torch.where(better, values, best), torch.where(better, numbers + start, which)
        for row in (best >= threshold).nonzero()[:, 0].tolist():
            found.append((at + row, int(which[row]), float(best[row])))
    return sorted(found, key=lambda one: (-one[2], one[0]))
