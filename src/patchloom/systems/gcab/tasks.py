"""Which classes come in which task.

>>> plan(["ant", "bee", "cat", "dog", "eel"], tasks=2)
[['ant', 'bee', 'cat'], ['dog', 'eel']]
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from patchloom.errors import UsageError, unknown_name

SEED = "seed"


def plan(
    names: Sequence[str], tasks: int, *, order: str | None = None, seed: int = 0, learnt: Sequence[str] = ()
) -> list[list[str]]:
    """Return the classes of each task: the classes in an order, divided into tasks of equal size or one class more.

    Args:
        names: Classes of the images.
        tasks: Number of tasks.
        order: `seed` for one drawn from the seed, names of classes separated by commas (others are left out), or None
            for that of `names`.
        seed: Seed of the draw.
        learnt: Classes that earlier tasks have had.

    Raises:
        UsageError: More tasks than classes, so that one would be empty; a class that is not there, or twice, or learnt.
    """
    if order is None or order == SEED:
        chosen = list(names)
        if order == SEED:
            chosen = [chosen[place] for place in np.random.default_rng(seed).permutation(len(chosen))]
    else:
        chosen = [name.strip() for name in order.split(",")]
    check([chosen], names, learnt)
    if tasks > len(chosen):
        raise UsageError(f"tasks is {tasks} and there are {len(chosen)} classes, so a task would be empty; lower it")
    ends = [0, *itertools.accumulate(len(part) for part in np.array_split(np.arange(len(chosen)), tasks))]
    return [chosen[start:end] for start, end in itertools.pairwise(ends)]


def read_plan(path: str | Path, names: Sequence[str], learnt: Sequence[str] = ()) -> list[list[str]]:
    """Return the classes of each task as a YAML file has them: a list of lists of names.

    Raises:
        UsageError: There is no such file, it holds something else, or see `plan`.
    """
    try:
        found: Any = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UsageError(f"task_file {path} does not exist") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"task_file {path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(found, list) or not found or not all(isinstance(one, list) for one in found):
        raise UsageError(f"task_file {path} holds no list of tasks, each a list of classes: - [cat, dog]")
    tasks = [[str(name) for name in one] for one in found]
    check(tasks, names, learnt)
    return tasks


def check(tasks: Sequence[Sequence[str]], names: Sequence[str], learnt: Sequence[str] = ()) -> None:
    """Refuse tasks that cannot be learnt, see `plan`."""
    seen: dict[str, int] = {}
    for number, task in enumerate(tasks, 1):
        if not task:
            raise UsageError(f"task {number} has no classes; leave it out")
        for name in task:
            if name in learnt:
                raise UsageError(
                    f"the class {name} was learnt in an earlier task; name the new ones alone, by class_order or "
                    f"task_file, or leave its images out"
                )
            if name not in names:
                raise unknown_name("class", name, names)
            if name in seen:
                where = f"in task {seen[name]} and in task {number}" if len(tasks) > 1 else "twice"
                raise UsageError(f"the class {name} is {where}; a class comes in one task")
            seen[name] = number
