"""Farthest points and their neighbours against plain Python loops over the same clouds.

python -m benchmarks.point_tokenizer
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from patchloom.systems.vit_lens.points import farthest_point_sample, gathered_points, knn_group
from patchloom.systems.vit_lens.tokenizers import PointTokenizer, Tokens


def plain_farthest(points: Tensor, count: int) -> Tensor:
    """Return what `farthest_point_sample` does, cloud by cloud, as it is mostly written."""
    rows = []
    for cloud in points:
        distance = torch.full((len(cloud),), 1e10)
        chosen = [0]
        for _ in range(count - 1):
            distance = torch.minimum(distance, ((cloud - cloud[chosen[-1]]) ** 2).sum(-1))
            chosen.append(int(distance.argmax()))
        rows.append(torch.tensor(chosen))
    return torch.stack(rows)


class PlainTokenizer(PointTokenizer):
    """The tokenizer with the plain loop, and convolutions over single points as the published code has them."""

    def forward(self, points: Tensor, start_index: object = None) -> Tokens:
        """Return tokens and positions."""
        centres = gathered_points(points, plain_farthest(points, self.num_groups))
        groups = gathered_points(points, knn_group(points, centres, self.group_size)) - centres[:, :, None]
        rows = self.encoder.first_conv(groups.flatten(0, 1).transpose(1, 2))
        rows = torch.cat([rows.amax(2, keepdim=True).expand_as(rows), rows], 1)
        found = self.encoder.second_conv(rows).amax(2).unflatten(0, groups.shape[:2])
        return Tokens(self.reduce_dim(found), self.pos_embed(centres))


def seconds(work: Callable[[], object], repeats: int = 5) -> float:
    """Return the least time of several."""
    found = []
    for _ in range(repeats):
        begun = time.perf_counter()
        work()
        found.append(time.perf_counter() - begun)
    return min(found)


def main() -> None:
    """Print the times."""
    torch.manual_seed(0)
    print("| clouds | points | groups | plain loop | here | times as fast | whole tokenizer |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for batch, points, groups in ((16, 512, 32), (32, 1024, 64), (32, 1024, 128)):
        clouds = torch.randn(batch, points, 3)
        assert torch.equal(plain_farthest(clouds, groups), farthest_point_sample(clouds, groups))
        plain = seconds(partial(plain_farthest, clouds, groups))
        here = seconds(partial(farthest_point_sample, clouds, groups))
        ours, theirs = (kind(groups, 16, 64, 64).eval() for kind in (PointTokenizer, PlainTokenizer))
        with torch.no_grad():
            theirs.load_state_dict(ours.state_dict())
            assert torch.allclose(ours(clouds).tokens, theirs(clouds).tokens, atol=1e-5)
            whole = seconds(partial(theirs, clouds), 3) / seconds(partial(ours, clouds), 3)
        print(
            f"| {batch} | {points} | {groups} | {plain * 1e3:.1f} ms | {here * 1e3:.1f} ms | {plain / here:.1f} | "
            f"{whole:.1f} |"
        )


if __name__ == "__main__":
    main()
