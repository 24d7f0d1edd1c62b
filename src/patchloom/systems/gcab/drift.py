"""Small networks that lead today's features back to those an earlier task was learnt on, one behind the other.

Cotogni et al. 2022, arXiv 2211.12292, "cascaded feature drift compensation".
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from patchloom.errors import UsageError


class DriftProjector(nn.Sequential):
    """From the patches after a task (B, N, D) to those before it (B, N, D).

    A linear layer on each patch, a norm over all patches and channels at once, ReLU, another linear layer. The linear
    layers are 1 x 1 convolutions, as published.

    Args:
        dim: D.
        num_tokens: N, which the norm fixes.
    """

    def __init__(self, dim: int, num_tokens: int) -> None:
        super().__init__(nn.Conv2d(dim, dim, 1), nn.LayerNorm([dim, 1, num_tokens]), nn.ReLU(), nn.Conv2d(dim, dim, 1))
        self.num_tokens = num_tokens

    def forward(self, patches: Tensor) -> Tensor:
        """Return the patches as they were.

        Raises:
            UsageError: Another number of patches.
        """
        if patches.shape[1] != self.num_tokens:
            raise UsageError(
                f"images of {patches.shape[1]} patches; drift between tasks was learnt on {self.num_tokens}, and holds "
                f"for images of that size only"
            )
        moved: Tensor = super().forward(patches.transpose(1, 2).unsqueeze(2))
        return moved.squeeze(2).transpose(1, 2)


def cascade(patches: Tensor, projectors: Sequence[nn.Module]) -> list[Tensor]:
    """Return the patches as each task knew them, the first task's first: as many as projectors, and one.

    Args:
        patches: (B, N, D), after the newest task.
        projectors: Number j leads from task j + 1 back to task j.
    """
    known = [patches]
    for projector in reversed(projectors):
        known.append(projector(known[-1]))
    return known[::-1]
