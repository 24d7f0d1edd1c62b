"""Binary gates that reserve channels of a block for a task, learnt by a sigmoid that grows steep.

Serrà et al. 2018, "Overcoming Catastrophic Forgetting with Hard Attention to the Task", arXiv 1801.01423, whose gates
Cotogni et al. 2022 (arXiv 2211.12292) put into class-attention.

>>> gates = TaskGates(tasks=3, width=4, hidden=8)
>>> width, hidden = gates.hard(0)
>>> width.shape, hidden.shape, set(width.tolist()) <= {0.0, 1.0}
(torch.Size([4]), torch.Size([8]), True)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from patchloom.errors import UsageError

STEEPEST = 800.0
"""Factor in the sigmoid at which a gate counts as closed or open (paper)."""
LARGEST = 6.0
"""Task embeddings stay within this of 0 (published code)."""
MOST = 50.0
"""Beyond this in its argument the slope of the sigmoid is nothing (published code)."""


class Gates(NamedTuple):
    """Gates of one task, in [0, 1]."""

    width: Tensor
    """(D,), on the width of the tokens."""
    hidden: Tensor
    """(H,), on the middle of the MLP."""


def steepness(batch: int, batches: int, steepest: float = STEEPEST) -> float:
    """Return the factor in the sigmoid for a batch of an epoch: from 1 / steepest up, anew in each epoch.

    Args:
        batch: Number of the batch, from 0.
        batches: Batches of the epoch.
        steepest: The factor after the last batch, which is never reached.
    """
    return (steepest - 1 / steepest) * batch / batches + 1 / steepest


class TaskGates(nn.Module):
    """The gates of all tasks: sigmoid(s · e), with an embedding e of each task for either gate.

    Args:
        tasks: Number of tasks, which has to be known in advance.
        width: D.
        hidden: H.
        steepest: s of the hard gates.
        largest: Embeddings are kept in [-largest, largest].
    """

    def __init__(
        self, tasks: int, width: int, hidden: int, steepest: float = STEEPEST, largest: float = LARGEST
    ) -> None:
        super().__init__()
        if tasks < 1:
            raise UsageError(f"tasks is {tasks}; it must be at least 1")
        self.steepest, self.largest = steepest, largest
        self.width = nn.Embedding(tasks, width)
        self.hidden = nn.Embedding(tasks, hidden)

    @property
    def tasks(self) -> int:
        """Number of tasks there can be."""
        return self.width.num_embeddings

    def soft(self, task: int, s: float) -> Gates:
        """Return the gates of a task while it is learnt, in float32 or better."""
        return Gates(*(torch.sigmoid(s * table.weight[task]) for table in (self.width, self.hidden)))

    def hard(self, task: int) -> Gates:
        """Return the gates of a task that has been learnt, 0 or 1, without gradient; an embedding of 0 is closed."""
        return Gates(*((table.weight[task].detach() > 0).to(table.weight) for table in (self.width, self.hidden)))

    def cumulative(self, tasks: int) -> Gates:
        """Return what the first so many tasks have reserved, 0 or 1."""
        return Gates(
            *((table.weight[:tasks].detach() > 0).any(0).to(table.weight) for table in (self.width, self.hidden))
        )

    def regulariser(self, task: int, s: float) -> Tensor:
        """Return the share of what is still free that a task's gates take, over both gates together.

        0 where nothing is free any more.
        """
        free = torch.cat([1 - reserved for reserved in self.cumulative(task)])
        taken = torch.cat(self.soft(task, s))
        return (taken * free).sum() / free.sum().clamp_min(1)

    def free(self, tasks: int) -> float:
        """Return the share of both gates that the first so many tasks have not reserved."""
        return float(torch.cat([1 - reserved for reserved in self.cumulative(tasks)]).mean())

    @torch.no_grad()
    def compensate_(self, s: float) -> None:
        """Scale the gradients of the embeddings, which a flat or a steep sigmoid makes small, by published rule.

        By steepest / s · (cosh(clamp(s e, -50, 50)) + 1) / (cosh(e) + 1).
        """
        for table in (self.width, self.hidden):
            e, slope = table.weight, table.weight.grad
            if slope is not None:
                slope.mul_(self.steepest / s * (torch.cosh((s * e).clamp(-MOST, MOST)) + 1) / (torch.cosh(e) + 1))

    @torch.no_grad()
    def clamp_(self) -> None:
        """Keep the embeddings in their range."""
        for table in (self.width, self.hidden):
            table.weight.clamp_(-self.largest, self.largest)
