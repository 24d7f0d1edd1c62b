"""Classes learnt task after task as a training method: one stage for each task, figures after each.

Cotogni et al. 2022, arXiv 2211.12292. The algorithm is in `model`, what it is compared with in `baselines`.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from patchloom.base.sizes import pair, size_text
from patchloom.data.base import Source, StreamSource
from patchloom.data.folder import FolderSource
from patchloom.data.subset import ClassesSource, SubsetSource, labelled_images
from patchloom.data.survey import notice
from patchloom.data.transforms import EvalTransform
from patchloom.encoders import Encoder, image_size, normalize
from patchloom.errors import UsageError
from patchloom.models.bundle import check_rebuilds
from patchloom.models.bundle import load as load_bundle
from patchloom.systems.gcab.config import FROZEN, ROOM, TASKS, GCABConfig
from patchloom.systems.gcab.gates import steepness
from patchloom.systems.gcab.measures import accuracies, is_whole, measured
from patchloom.systems.gcab.model import GCAB, Tasks
from patchloom.systems.gcab.saved import TaskRecord, build, read_record, rebuild, save_tasks, settings_of
from patchloom.systems.gcab.tasks import plan, read_plan
from patchloom.training.labelled import LabelledMethod, open_test_images
from patchloom.training.labelled_config import LabelledConfig
from patchloom.training.method import Transform
from patchloom.training.phases import Stage
from patchloom.training.supervised import classifier_augmentation

if TYPE_CHECKING:
    from patchloom.report import Section

SMALL = 32
"""Images of up to so many pixels are cropped with a padding, larger ones as ImageNet's (paper)."""
LITTLE = 0.01
"""Share of the gates below which hardly anything is free for another task."""


class GCABMethod(LabelledMethod):
    """GCAB: classes learnt task after task, without forgetting and without keeping old images.

    Attributes:
        tasks: Names of the classes of each task, those of the run that is gone on from among them.
        before: How many of them are learnt already.
        history: Figures after each task that has been learnt, of that run among them.
        model: What learns.
    """

    config_class = GCABConfig
    config: GCABConfig
    normalises = True

    def __init__(self, config: GCABConfig, source: Source | StreamSource) -> None:
        if not isinstance(source, Source):
            raise UsageError(f"{config.data} can only be read from front to back, and tasks choose images; unpack it")
        if source.multilabel:
            raise UsageError(
                f"images of {config.data} have several labels; classes that come in tasks are one per image"
            )
        record = None if config.continue_from is None else read_record(config.continue_from)
        self.tasks = planned(config, source, record)
        self.before = 0 if record is None else len(record.tasks)
        self.history: list[dict[str, Any]] = [] if record is None else list(record.history)
        self.images_before = [] if record is None else record.class_images
        self.augmentation: Transform | None = None
        names, new = ([name for task in self.tasks[start:] for name in task] for start in (0, self.before))
        super().__init__(config, ClassesSource(source, names, new))
        self.model = self.build_model(record)
        check_rebuilds(self.encoder)

    # What there is to learn.

    @classmethod
    def open_data(cls, config: Any) -> tuple[Source | StreamSource, Any]:
        """Return the images, and the settings with what was settled: number of tasks, and those of a run gone on from.

        Raises:
            UsageError: Tasks that cannot be learnt, or settings another run has otherwise.
        """
        record = None
        if config.continue_from is not None:
            record = read_record(config.continue_from)
            config = dataclasses.replace(config, encoder=config.continue_from, **settled_before(config, record))
        source, config = super().open_data(config)
        if isinstance(source, FolderSource) and source.class_names is None:
            source.label_one_class()  # a task may be of one class
        if not isinstance(source, Source) or source.class_names is None or source.multilabel:
            return source, config  # which the method refuses
        tasks = planned(config, source, record)
        new = tasks[0 if record is None else len(record.tasks) :]
        settled: dict[str, Any] = {}
        if config.tasks is None and config.task_file is None:
            settled["tasks"] = len(new)
        if config.max_tasks is None:
            settled["max_tasks"] = room(config, tasks)
        left = [name for name in source.class_names if not any(name in task for task in new)]
        sizes = ", ".join(str(len(task)) for task in new)
        classes = "class" if sizes == "1" else "classes"
        said = f"{len(new)} {'task' if len(new) == 1 else 'tasks'} of {sizes} {classes}"
        if "max_tasks" in settled and config.learner not in FROZEN:
            said += f"; max_tasks is {settled['max_tasks']}, so {settled['max_tasks'] - len(tasks)} can be added later"
        if left:
            said += f"; left out: {', '.join(left[:5])}{' …' if len(left) > 5 else ''}"
        notice(said)
        return source, dataclasses.replace(config, **settled)

    @classmethod
    def images_to_learn_from(cls, config: Any, source: Source | StreamSource) -> int | None:
        """Return about how many images the smallest task has: a batch has to fit all."""
        count = super().images_to_learn_from(config, source)
        if count is None or not isinstance(source, Source) or source.class_names is None or source.multilabel:
            return count
        record = None if config.continue_from is None else read_record(config.continue_from)
        tasks = planned(config, source, record)[0 if record is None else len(record.tasks) :]
        images = dict(zip(source.class_names, class_sizes(source), strict=True))
        smallest = min(sum(images[name] for name in task) for task in tasks)
        return max(1, count * smallest // len(source))

    def open_test(self, config: LabelledConfig, source: Source | StreamSource) -> Source | StreamSource:
        """Return the images of `test` that are of classes of this run; classes of earlier tasks may be among them.

        Raises:
            UsageError: They cannot be told apart by class, or there are none.
        """
        test = open_test_images(config, source, one_class=True)
        if not isinstance(test, Source) or test.multilabel:
            raise UsageError(f"test images {config.test} have to be read by number, and to have one class each")
        names = list(source.class_names or [])
        test = ClassesSource(labelled_images(test)[0], names)
        if not len(test):
            raise UsageError(f"the test images {config.test} show none of the classes {', '.join(names[:8])}")
        return test

    def count_classes(self, learnt: Source) -> Tensor:
        """Return the number of images of each class that is or was learnt from.

        Raises:
            UsageError: A class of a task to come without an image.
        """
        assert learnt.labels is not None
        assert learnt.class_names is not None
        counts = np.bincount(learnt.labels, minlength=len(learnt.class_names))
        known = len(self.images_before)
        counts[:known] = self.images_before
        if missing := [name for name, count in zip(learnt.class_names, counts, strict=True) if not count]:
            raise UsageError(
                f"no image to learn from shows {', '.join(missing[:3])}; add images, or leave the class out"
            )
        return torch.from_numpy(counts.astype(np.int64))

    # What learns.

    def build_encoder(self) -> Encoder:
        """Return the encoder; that of a run gone on from as it is.

        Raises:
            UsageError: Another image size than that run's, beside what every method refuses.
        """
        path, size = self.config.continue_from, self.config.image_size
        if path is not None and size is not None and pair(size) != (known := image_size(load_bundle(path))):
            raise UsageError(
                f"image_size is {size_text(size)} and {path} learnt from images of {size_text(known)}; drift between "
                f"tasks holds for one size only, so leave image_size out"
            )
        return super().build_encoder()

    def build_model(self, record: TaskRecord | None) -> Tasks:
        """Return what learns, with the tasks in it that a run gone on from has learnt."""
        config = self.config
        training = {
            "lambda_gate": config.lambda_gate,
            "lambda_drift": config.lambda_drift,
            "drop_path": config.drop_path,
            "strict_protection": config.strict_protection,
        }
        if record is not None:
            assert config.continue_from is not None
            return rebuild(self.encoder, record, config.continue_from, **training)
        settings = {
            **training,
            "steepest": config.steepest,
            "largest": config.clamp,
            "compensate": config.compensate and config.learner == "gcab",
            "cascade": config.cascade,
            "freeze_encoder": config.freeze_encoder,
            "gated": config.learner == "gcab",
        }
        return build(self.encoder, config.learner, room(config, self.tasks), settings)

    def stages(self) -> list[Stage]:
        """Return a stage for each task, on its images alone.

        Raises:
            UsageError: A task has fewer images than a batch.
        """
        assert isinstance(self.source, Source)
        assert self.source.labels is not None
        config = self.config
        stages, end = [], sum(len(task) for task in self.tasks[: self.before])
        for number, task in enumerate(self.tasks[self.before :], self.before + 1):
            start, end = end, end + len(task)
            images = np.flatnonzero((self.source.labels >= start) & (self.source.labels < end))
            if len(images) < (at_once := config.batch_size * config.accumulate * self.trainer.world_size):
                raise UsageError(
                    f"task {number} has {len(images)} images to learn from, fewer than a step of {at_once}; lower "
                    f"batch_size"
                )
            once = 1 if config.learner == "nearest_mean" else None
            stages.append(Stage(f"task {number}", SubsetSource(self.source, images), once))
        return stages

    def enter_stage(self, number: int) -> None:
        """Begin a task."""
        task = self.before + number
        torch.manual_seed(hash((self.config.seed, task)) & 0x7FFF_FFFF_FFFF_FFFF)
        self.model.add_task(len(self.tasks[task]))
        self.model.train()
        if number and self._trainer is not None and self.trainer.is_global_zero:
            notice(f"task {task + 1} of {len(self.tasks)}: {', '.join(self.tasks[task][:8])}")

    def enter_trial(self) -> None:
        """Begin all tasks: the last one takes most."""
        for number in range(len(self.tasks) - self.before):
            self.enter_stage(number)

    def transform(self) -> Transform:
        """Return the paper's augmentation; its images are normalised for the encoder. Class means take images as is."""
        if self.config.learner == "nearest_mean":
            return EvalTransform(self.input_size)
        if self.augmentation is None:
            assert isinstance(self.source, Source)
            config = self.config
            if config.crop_padding is None and max(self.input_size) <= SMALL:
                config = dataclasses.replace(config, crop_padding=4)
            self.augmentation = classifier_augmentation(config, self.encoder, self.input_size, self.source)
        return self.augmentation

    def steepness(self) -> float:
        """Return the factor in the gates' sigmoid at the present step: it rises within each epoch."""
        span = self.span
        return steepness((self.step - span.start) % span.per_epoch, span.per_epoch, self.config.steepest)

    def training_loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return the losses of a batch, see `GCAB.training_losses`."""
        images = batch["image"]
        if self.config.learner == "nearest_mean":
            images = normalize(self.pixels(images), self.encoder)
        return self.model.training_losses(images, batch["label"], self.steepness())

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Take gradients off what earlier tasks have reserved and scale those of the gates; clipping comes after."""
        super().on_before_optimizer_step(optimizer)
        self.model.correct_gradients_(self.steepness())

    def after_step(self) -> None:
        """Put back what is reserved; at the end of a task, measure."""
        self.model.after_step_()
        if self.step + 1 == self.span.end and self.trainer.is_global_zero:
            self.finish_task()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["tasks"] = [list(task) for task in self.tasks]
        checkpoint["history"] = self.history

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if checkpoint["tasks"] != self.tasks:
            raise UsageError(
                f"the run in {self.config.out} has other tasks than these: task_file or the classes of the images have "
                f"changed since; put them back as they were, or start a new run"
            )
        super().on_load_checkpoint(checkpoint)
        self.history = list(checkpoint["history"])

    # What it is worth.

    @property
    def seen(self) -> int:
        """Classes of the tasks so far."""
        return sum(self.model.class_counts)

    def answers(self, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """Return logits (n, classes seen) and labels (n,) of the test images of classes seen; None without such."""
        if not isinstance(self.test, Source) or self.test.labels is None:
            return None
        shown = SubsetSource(self.test, np.flatnonzero(self.test.labels < self.seen))
        if not len(shown):
            return None
        return self.outputs(lambda images: self.model(normalize(images, self.encoder)), device, self.model, shown)

    def finish_task(self) -> None:
        """Measure after a task, keep the figures and say them."""
        number = len(self.model.heads)
        figures: dict[str, Any] = {"task": number}
        if (answers := self.answers(self.device)) is not None:
            figures |= measured(*answers, self.model.task_of_classes())
            unseen = [str(task) for task, count in enumerate(figures["images_by_task"], 1) if not count]
            of = f"; no test images of task {', '.join(unseen)}, so nothing of what is forgotten" if unseen else ""
            notice(
                f"after task {number}: {figures['accuracy']:.1%} of {figures['images']} images, "
                f"{figures['task_aware_accuracy']:.1%} where the task is known{of}"
            )
        if isinstance(self.model, GCAB) and self.model.gated:
            figures |= {"reserved": self.reserved(number), "free": self.model.gates.free(number)}
            if figures["free"] < LITTLE:
                notice(
                    f"warning: {number} tasks have reserved {1 - figures['free']:.1%} of the gated block; what comes "
                    f"is learnt by the encoder, a token and a head alone, so raise lambda_gate, or take a wider encoder"
                )
        self.history.append(figures)

    def reserved(self, tasks: int) -> dict[str, float]:
        """Return the share of each gate that so many tasks have reserved."""
        assert isinstance(self.model, GCAB)
        width, hidden = self.model.gates.cumulative(tasks)
        return {"width": float(width.mean()), "hidden": float(hidden.mean())}

    def validate(self, device: torch.device) -> dict[str, Any]:
        """Return the figures of the test images of all classes seen, see `Targets.measure`, and the task-aware one."""
        answers = self.answers(device)
        if answers is None:
            return {}
        aware = measured(*answers, self.model.task_of_classes())
        self.figures = self.measure(*answers) | {"accuracy_task_known": aware["task_aware_accuracy"]}
        return self.figures

    def results(self) -> dict[str, Any]:
        """Return the accuracies after each task, and what they come to; None where a task had no test images."""
        matrices = {"accuracy": "by_task", "task_aware_accuracy": "by_task_aware"}
        found: dict[str, Any] = {}
        for name, by_task in matrices.items():
            prefix = "task_aware_" if name != "accuracy" else ""
            rows = [filled(figures.get(by_task), len(self.history)) for figures in self.history]
            found[f"{prefix}accuracy_matrix"] = rows
            whole = [figures if is_whole(figures) else {} for figures in self.history]
            found[f"{prefix}accuracy_by_task"] = [figures.get(name) for figures in whole]
            found[f"{prefix}intervals_by_task"] = [figures.get(f"{prefix}interval") for figures in whole]
            if rows:
                known = accuracies(rows, found[f"{prefix}accuracy_by_task"])
                found |= {f"{prefix}{figure}": value for figure, value in known.items()}
        return found

    def summary(self) -> dict[str, Any]:
        """Return the tasks and their figures beside what every way to learn from labels says."""
        gated = [figures for figures in self.history if "free" in figures]
        return {
            **super().summary(),
            "tasks": self.tasks,
            "tasks_learnt": len(self.history),
            **self.results(),
            "reserved": [figures["reserved"] for figures in gated],
            "free": [figures["free"] for figures in gated],
        }

    def report_sections(self, images: Tensor) -> list[Section]:
        """Return accuracy over tasks, the accuracy matrices and the use of gates, then the figures of each class."""
        from patchloom.systems.gcab.page import task_sections

        return [*task_sections(self.tasks, self.history, self.results()), *super().report_sections(images)]

    # What is left behind.

    def lineage(self) -> dict[str, Any]:
        """Return what the run went on from."""
        return {"continued_from": self.config.continue_from} if self.config.continue_from else {}

    def save_model(self, model: Encoder, path: Path, lineage: dict[str, Any]) -> None:
        """Write the encoder as a bundle, and the tasks beside it."""
        super().save_model(model, path, lineage)
        known = len(self.model.heads)
        counts = self.targets.counts
        record = TaskRecord(
            learner=self.config.learner,
            tasks=self.tasks[:known],
            max_tasks=room(self.config, self.tasks),
            settings=settings_of(self.model),
            class_images=[] if counts is None else counts[: self.seen].tolist(),
            history=self.history,
        )
        save_tasks(self.model, record, path)


def class_sizes(source: Source) -> list[int]:
    """Return the number of images of each class."""
    if source.labels is None:
        return []
    return np.bincount(source.labels[source.labels >= 0], minlength=len(source.class_names or [])).tolist()


def planned(config: GCABConfig, source: Source, record: TaskRecord | None) -> list[list[str]]:
    """Return the classes of each task, those learnt before among them.

    Raises:
        UsageError: Tasks that cannot be learnt, see `tasks.plan`, or more than there is room for.
    """
    old = [] if record is None else record.tasks
    learnt = [] if record is None else record.class_names
    names = list(source.class_names or [])
    if config.task_file is not None:
        new = read_plan(config.task_file, names, learnt)
    else:
        usual = TASKS if record is None else 1
        new = plan(names, config.tasks or usual, order=config.class_order, seed=config.seed, learnt=learnt)
    tasks = [*old, *new]
    if len(tasks) > (most := room(config, tasks)) and config.learner not in FROZEN:
        raise UsageError(
            f"there are {len(tasks)} tasks and max_tasks is {most}; gates are made in advance, so "
            f"{'raise it' if record is None else 'start a new run with a larger one'}"
        )
    return tasks


def room(config: GCABConfig, tasks: list[list[str]]) -> int:
    """Return how many tasks there can be."""
    return config.max_tasks or len(tasks) + ROOM


def settled_before(config: GCABConfig, record: TaskRecord) -> dict[str, Any]:
    """Return the settings that the run gone on from has settled.

    Raises:
        UsageError: One of them was given otherwise.
    """
    settled: dict[str, Any] = {"learner": record.learner, "max_tasks": record.max_tasks}
    if record.settings:
        settled |= {name: record.settings[name] for name in ("steepest", "cascade", "freeze_encoder")}
        settled |= {"clamp": record.settings["largest"]}
        if record.learner == "gcab" and not record.settings["freeze_encoder"]:
            settled["compensate"] = record.settings["compensate"]
    defaults = {one.name: one.default for one in dataclasses.fields(config)}
    for name, value in settled.items():
        if (given := getattr(config, name)) not in (value, defaults[name]):
            raise UsageError(f"the run in {config.continue_from} has {name}={value}, not {given}; leave it out")
    return settled


def filled(row: list[Any] | None, length: int) -> list[Any]:
    """Return a row of the accuracy matrix at full length: None for tasks that were yet to come."""
    return [*(row or []), *[None] * length][:length]
