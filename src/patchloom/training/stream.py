"""The batches of a run: all of them in one pass, stage by stage and epoch after epoch."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from patchloom.data import make_loader
from patchloom.errors import UsageError
from patchloom.training.phases import Span, Stage

if TYPE_CHECKING:
    from patchloom.training.method import Method


def open_stream(method: Method) -> TrainingStream:
    """Return all batches of a run, from the present position on; its stages, steps and epochs are counted on the way.

    Raises:
        UsageError: An epoch has fewer batches than a step takes.
    """
    config, stages = method.config, method.stages()
    loaders = [method.loader(stage) for stage in stages]
    method.spans, start = [], 0
    for stage, loader in zip(stages, loaders, strict=True):
        per_epoch = len(loader) // config.accumulate
        if per_epoch == 0:
            raise UsageError(
                f"accumulate={config.accumulate} needs {config.accumulate} batches per epoch, and "
                f"{method.source.name} gives {len(loader)} of batch_size={config.batch_size}; lower one of them"
            )
        steps = (stage.epochs or config.epochs) * per_epoch
        if config.max_steps is not None:
            steps = config.max_steps if len(stages) == 1 else min(steps, config.max_steps - start)
        method.spans.append(Span(start, steps, per_epoch))
        start += steps
    method.total_steps, method.steps_per_epoch = start, method.span.per_epoch
    method.lanes = next((loader.lanes for loader in loaders if loader.lanes is not None), None)
    method.images_left_out, method.images_repeated = loaders[method.stage].left_out, loaders[method.stage].repeated
    if method.trainer.is_global_zero and method.repeats() == 1:
        _say_what_is_uneven(method)
    return TrainingStream(loaders, method)


def stage_loader(method: Method, stage: Stage, batch_size: int | None = None) -> Any:
    """Return the loader of a stage's images, for this process, in batches of the settings' size or another."""
    config, trainer = method.config, method.trainer
    return make_loader(
        method.training_source() if stage.source is None else stage.source,
        method.transform(),
        batch_size or config.batch_size,
        seed=config.seed,
        shuffle=True,
        num_workers=config.num_workers,
        rank=trainer.global_rank,
        world_size=trainer.world_size,
        drop_last=True,
        pin_memory=method.device.type == "cuda",
        repeats=method.repeats(),
        accumulate=config.accumulate,
        lanes=method.lanes,
    )


class TrainingStream:
    """All batches of a run in one pass, epoch after epoch, from where the run stands.

    Lightning sees a single long epoch: then there is one way to resume, in the middle of it, and the position
    in the data is ours to restore exactly.
    """

    def __init__(self, loaders: list[Any], method: Method) -> None:
        self.loaders = loaders
        self.method = method
        self.total = method.total_steps * method.config.accumulate

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Iterator[dict[str, Any]]:
        method, times = self.method, self.method.config.accumulate
        done = method.batches_done
        for number, (loader, span) in enumerate(zip(self.loaders, method.spans, strict=True)):
            if done >= span.end * times:
                continue
            if number > method.stage:
                method.begin_stage(number)
            per_epoch = span.per_epoch * times
            while done < span.end * times:
                epoch, offset = divmod(done - span.start * times, per_epoch)
                loader.set_position(epoch, offset)
                for batch in loader:
                    yield batch
                    done += 1
                    if (done - span.start * times) % per_epoch == 0 or done == span.end * times:
                        break


def _say_what_is_uneven(method: Method) -> None:
    what = method.source.kind.plural
    if method.images_left_out:
        per_step = method.config.batch_size * method.config.accumulate * method.trainer.world_size
        uneven = f"{method.images_left_out:,} {what} do not fill a step of {per_step:,}: each epoch leaves so many out"
    elif method.images_repeated:
        uneven = f"{method.images_repeated:,} {what} come once more in each epoch, so that all processes take as many"
    else:
        return
    print(f"{uneven}, others each time", file=sys.stderr)
