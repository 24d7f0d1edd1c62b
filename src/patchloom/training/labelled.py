"""What every way to learn from labels shares: which images, which loss, which figures.

A method derives its settings from `LabelledConfig` and itself from `LabelledMethod`; then label budgets, held-out
images, kinds of targets, class weights, metrics and the report's table come with it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from patchloom.data import make_loader, open_source
from patchloom.data.base import Source, StreamSource, no_labels
from patchloom.data.folder import FolderSource
from patchloom.data.kinds import require_kind
from patchloom.data.subset import labelled_images
from patchloom.encoders import Encoder, normalize
from patchloom.errors import UsageError
from patchloom.training.labelled_config import LabelledConfig, LossOptions
from patchloom.training.long_tail import class_groups
from patchloom.training.method import Method
from patchloom.training.selection import class_counts, hold_out, limit_labels, long_tailed
from patchloom.training.targets import Targets

if TYPE_CHECKING:
    from patchloom.report import Section

# Names of images without label that a summary lists; all are counted.
MOST_LISTED = 1000


class LabelledMethod(Method):
    """A way to learn from labels.

    Attributes:
        class_names: Names of the classes or labels, in the order of the outputs.
        test: What is measured on, or None.
        targets: Loss and metrics.
        figures: Those of the latest validation; empty before there was one.
        normalises: Whether data workers hand out images that are normalised for the encoder.
    """

    needs_labels = True
    normalises: ClassVar[bool] = False
    config: LabelledConfig

    def __init__(self, config: LabelledConfig, source: Source | StreamSource) -> None:
        if source.class_names is None or len(source.class_names) < 2:
            raise UsageError(f"a classifier needs at least two classes; {config.data} has {source.class_names}")
        self.unlabelled: list[str] = []
        if isinstance(source, Source):
            source, self.unlabelled = labelled_images(source)
        self.class_names = list(source.class_names or [])
        task = _task(config, source)
        if isinstance(source, StreamSource):
            learnt: Source | StreamSource = source
            test = None if config.test is None else self.open_test(config, source)
            counts = None
            if config.label_fraction < 1 or (config.shots, config.groups, config.imbalance) != (None, None, None):
                raise UsageError(
                    f"{config.data} can only be read from front to back, so label_fraction, shots, groups and "
                    f"imbalance cannot be met; unpack the shards to .tar"
                )
            if source.unlabelled:
                raise UsageError(
                    f"{source.unlabelled} images of {config.data} have no label, and are left out only where images "
                    f"are read by number; unpack the shards to .tar"
                )
        else:
            if config.test is not None:
                learnt, test = source, self.open_test(config, source)
                if isinstance(test, Source):
                    test, unlabelled = labelled_images(test)
                    self.unlabelled = [*self.unlabelled, *unlabelled]
            elif config.val_fraction:
                learnt, test = hold_out(source, config.val_fraction, config.seed, config.groups)
            else:
                learnt, test = source, None
            if config.imbalance is not None:
                learnt = long_tailed(learnt, config.imbalance, config.imbalance_kind)
            learnt = limit_labels(learnt, fraction=config.label_fraction, shots=config.shots, seed=config.seed)
            counts = self.count_classes(learnt)
        super().__init__(config, learnt)
        self.test = test
        self.figures: dict[str, Any] = {}
        self.targets = Targets(
            self.class_names,
            kind=task,
            counts=counts,
            weighting=config.class_weights,
            logit_adjustment=config.logit_adjustment if isinstance(config, LossOptions) else 0.0,
            label_smoothing=0.0 if task == "multi" else config.label_smoothing,
            distance=config.ordinal_distance if isinstance(config, LossOptions) else 0.0,
            groups=class_groups(counts.tolist()) if counts is not None and self.has_tail() else None,
        )

    def open_test(self, config: LabelledConfig, source: Source | StreamSource) -> Source | StreamSource:
        """Return the images that `test` names.

        Raises:
            UsageError: They have no labels, or classes that the images to learn from do not have.
        """
        return _open_test(config, source)

    def count_classes(self, learnt: Source) -> Tensor:
        """Return the number of images of each class to learn from, (C,) int64, or of images with each label.

        Raises:
            UsageError: A class without an image.
        """
        return class_counts(learnt)

    @classmethod
    def open_data(cls, config: Any) -> tuple[Source | StreamSource, Any]:
        """Return the images by number where they can be read so, as parts of them are held out and chosen."""
        source, config = super().open_data(config)
        return source.by_index() if isinstance(source, StreamSource) and source.seeks else source, config

    @classmethod
    def images_to_learn_from(cls, config: Any, source: Source | StreamSource) -> int | None:
        """Return about how many images remain to learn from after the held-out part and the label budget."""
        count = super().images_to_learn_from(config, source)
        if count is None:
            return None
        count -= max(1, round(config.val_fraction * count)) if config.test is None and config.val_fraction else 0
        if config.shots is not None:
            return min(count, config.shots * len(source.class_names or []))
        return max(1, round(config.label_fraction * count))

    def has_tail(self) -> bool:
        """Return whether accuracy is reported for the head, the middle and the tail of the classes."""
        return self.config.imbalance is not None

    def late(self) -> bool:
        """Return whether the present step is one of those in which class weights count."""
        return self.step >= round(self.config.reweight_from * self.total_steps)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        self.targets.weighing = self.late()

    def validate(self, device: torch.device) -> dict[str, Any]:
        """Return the figures of the test images, see `Targets.measure`."""
        if self.test is None:
            return {}
        model = self.bundle_model()
        self.figures = self.measure(
            *self.outputs(lambda images: self.answer(model, normalize(images, model)), device, model)
        )
        return self.figures

    @torch.no_grad()
    def outputs(
        self,
        answer: Callable[[Tensor], Tensor],
        device: torch.device,
        model: torch.nn.Module,
        images: Source | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return what is said of the test images, and their labels in the order of the outputs.

        Args:
            answer: Takes images (B, C, H, W) in [0, 1] of the encoder's size, returns (B, …).
            device: Where it computes.
            model: Is put into eval mode meanwhile.
            images: Some of the test images; default: all.

        Raises:
            UsageError: No test image can be read.
        """
        test = self.test if images is None else images
        assert test is not None
        config = self.config
        modes = [(module, module.training) for module in model.modules()]
        model.eval()
        answers, labels = [], []
        loader = make_loader(
            test,
            test.kind.eval_view("crop", self.sample_size),
            config.batch_size,
            seed=0,
            shuffle=False,
            num_workers=config.num_workers,
        )
        for batch in loader:
            if not batch["key"]:
                continue
            answers.append(answer(self.pixels(batch[test.kind.name].to(device))).float().cpu())
            labels.append(batch["label"])
        for module, training in modes:
            module.training = training
        if not answers:
            raise UsageError(f"{test.name} holds no readable image to measure on")
        targets = torch.cat(labels)
        if isinstance(test, Source) and test.class_names != self.class_names:
            targets = _renumbered(targets, test.class_names or [], self.class_names)
        return torch.cat(answers), targets

    def answer(self, model: Encoder, inputs: Tensor) -> Tensor:
        """Return what is measured of test images: logits (B, C)."""
        logits: Tensor = model(inputs)
        return logits

    def measure(self, answers: Tensor, labels: Tensor) -> dict[str, Any]:
        """Return the figures of all answers, see `Targets.measure`."""
        return self.targets.measure(answers, labels)

    def summary(self) -> dict[str, Any]:
        """Return the classes in the order of the outputs, and which images were learnt from, measured on, left out."""
        count = len(self.source) if isinstance(self.source, Source) else None
        measured = None if not isinstance(self.test, Source) else len(self.test)
        return {
            "class_names": self.class_names,
            "task": self.targets.kind,
            "headline": self.targets.headline,
            "labelled_images": count,
            "test_images": measured,
            "held_out": self.config.test is None and self.test is not None,
            "unlabelled_images": len(self.unlabelled),
            "unlabelled": self.unlabelled[:MOST_LISTED],
            **self._long_tail(),
        }

    def _long_tail(self) -> dict[str, Any]:
        """Return how many images each class has, and which classes are head, middle and tail, where that matters."""
        counts, groups = self.targets.counts, self.targets.groups
        if counts is None or groups is None:
            return {}
        return {
            "class_counts": dict(zip(self.class_names, counts.tolist(), strict=True)),
            "class_groups": {name: [self.class_names[c] for c in group] for name, group in groups.items()},
        }

    def report_sections(self, images: Tensor) -> list[Section]:
        """Return the figures of each class."""
        from patchloom.report import Section

        figures = self.figures or self.validate(self.device)  # the probe has just measured at the run's end
        if not figures:
            return []
        what = "the test images" if self.config.test is not None else "held-out images"
        if self.targets.kind == "multi":
            table: list[dict[str, object]] = [
                {"label": name, "AUROC": f"{area:.3f}"} for name, area in figures["per_label_auroc"].items()
            ]
            text = f"Mean AUROC {figures['auroc']:.3f} on {what}; average precision {figures['average_precision']:.3f}."
            return [Section(title="AUROC by label", text=text, table=table)]
        counts = self._long_tail().get("class_counts", {})
        table = [
            {"class": name, **({"training images": counts[name]} if counts else {}), "accuracy": f"{share:.1%}"}
            for name, share in figures["per_class_accuracy"].items()
        ]
        text = (
            f"{figures['accuracy']:.1%} of {what}; mean over classes (balanced accuracy) "
            f"{figures['balanced_accuracy']:.1%}; naming the commonest class every time gives "
            f"{figures['majority_share']:.1%}."
        )
        if counts:
            parts = {name: figures.get(f"accuracy_{name}") for name in ("head", "mid", "tail")}
            shares = ", ".join(f"{name} {share:.1%}" for name, share in parts.items() if share is not None)
            text += f" Classes by their number of training images: {shares}."
        if "kappa" in figures:
            text += f" Quadratic kappa {figures['kappa']:.3f}, mean error {figures['mean_grade_error']:.2f} grades."
        return [Section(title="Accuracy by class", text=text, table=table)]


def _task(config: LabelledConfig, source: Source | StreamSource) -> Literal["single", "multi", "ordinal"]:
    multilabel = bool(getattr(source, "multilabel", False))
    if config.task == "auto":
        return "multi" if multilabel else "single"
    if multilabel != (config.task == "multi"):
        has = "several labels per image" if multilabel else "one class per image"
        raise UsageError(f"task is {config.task}, but {config.data} has {has}; leave task out")
    return config.task


def open_test_images(
    config: LabelledConfig, source: Source | StreamSource, *, one_class: bool = False
) -> Source | StreamSource:
    """Return the images that `test` names, read as the settings say.

    Args:
        config: The settings.
        source: The images to learn from.
        one_class: A folder may hold one class alone.

    Raises:
        UsageError: They cannot be opened, have no labels, or are of another kind than those of `source`.
    """
    assert config.test is not None
    options = {"by_index": True, **config.source_options()}
    test = open_source(config.test, in_chans=config.in_chans, seed=config.seed, **options)
    require_kind(test, (source.kind.name,), f"what is measured beside {config.data}")
    if one_class and isinstance(test, FolderSource):
        test.label_one_class()
    if test.class_names is None:
        raise no_labels(test, "figures need labelled test images and ")
    return test


def _open_test(config: LabelledConfig, source: Source | StreamSource) -> Source | StreamSource:
    """Return the test images; their classes have to be among those learnt."""
    test = open_test_images(config, source)
    names = list(source.class_names or [])
    unknown = [name for name in test.class_names or [] if name not in names]
    if unknown:
        raise UsageError(
            f"the test images {config.test} show classes that {config.data} does not have: {', '.join(unknown[:3])}; "
            f"a class that is missing in training cannot be told"
        )
    multilabel = bool(getattr(test, "multilabel", False))
    if test.class_names != names and (isinstance(test, StreamSource) or multilabel):
        raise UsageError(f"the classes of {config.test} come in another order than those of {config.data}")
    return test


def _renumbered(labels: Tensor, names: list[str], order: list[str]) -> Tensor:
    """Return class numbers in the order of other names; unknown stays -1."""
    numbers = torch.from_numpy(np.array([order.index(name) for name in names], dtype=np.int64))
    return torch.where(labels >= 0, numbers[labels.clamp_min(0)], labels)
