"""Teachers of classifiers: opened, frozen, shown the student's images as they know them, asked about the same classes.

Settings and training method that every distillation into a classifier derives from.

>>> import timm, torch
>>> teacher = FrozenTeacher(timm.create_model("cifar_resnet20", num_classes=10), "a teacher")
>>> student = timm.create_model("vit_tiny_patch16_224", num_classes=10)
>>> teacher(teacher.view(torch.randn(2, 3, 224, 224), student)).shape
torch.Size([2, 10])
"""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from patchloom.base.sizes import Size, pair, size_text
from patchloom.data.base import Source, StreamSource
from patchloom.data.kinds import KINDS
from patchloom.encoders import (
    Encoder,
    grid_size,
    has_tokens,
    in_chans,
    input_size,
    kind_of,
    normalize,
    set_image_size,
)
from patchloom.encoders.patches import Grid, shown
from patchloom.errors import UsageError
from patchloom.features.class_scores import class_scores
from patchloom.models.bundle import fetch_encoder, load, read_lineage
from patchloom.training.distill_config import DistillConfig
from patchloom.training.frozen import leave_out, put_back
from patchloom.training.run import is_first_process
from patchloom.training.supervised import SupervisedMethod

if TYPE_CHECKING:
    from patchloom.report import Section

Interpolation = Literal["bilinear", "bicubic"]


class FrozenTeacher(nn.Module):
    """A frozen classifier or encoder. It stays in eval mode whatever is asked of it: its answers must not be noisy.

    Args:
        model: An image model of timm, with or without classifier.
        name: What the user calls it.

    Attributes:
        class_names: What its outputs mean, where it is known.
    """

    order: Tensor | None

    def __init__(self, model: nn.Module, name: str) -> None:
        super().__init__()
        given: Any = model.requires_grad_(False).eval()
        self.model, self.name = given, name
        known = given.pretrained_cfg.get("label_names")
        self.class_names: list[str] | None = None if known is None else [str(label) for label in known]
        adapter = getattr(given, "active_adapter", None)
        if adapter is not None and given.adapters[adapter].head is not None and self.class_names is not None:
            given.num_classes = len(self.class_names)  # the adapter's classifier; the encoder has none of its own
        self.register_buffer("order", None, persistent=False)

    def train(self, mode: bool = True) -> FrozenTeacher:
        """Stay in eval mode."""
        return super().train(False)

    @property
    def size(self) -> Grid:
        """Sides of what it is shown without channels: (H, W) of images, (T, H, W) of clips."""
        return input_size(self.model)

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) of the images it is shown, or of the frames of clips, in pixels."""
        size = self.size
        return size[-2], size[-1]

    def why_not(self, class_names: list[str]) -> str | None:
        """Return why it cannot be asked about some classes, in words, or None; its outputs then come in their order.

        Names are compared where the teacher knows its own, numbers of classes otherwise.
        """
        count = int(self.model.num_classes)
        if not count:
            return f"the teacher {self.name} has no classifier"
        if self.class_names is not None and len(self.class_names) == count:
            unknown = [name for name in class_names if name not in self.class_names]
            extra = [name for name in self.class_names if name not in class_names]
            if unknown or extra:
                reason = f"does not know {', '.join(unknown[:3])}" if unknown else f"also knows {', '.join(extra[:3])}"
                return f"the teacher {self.name} tells other classes apart than the data's: it {reason}"
            order = [self.class_names.index(name) for name in class_names]
            if order != list(range(count)):
                self.order = torch.tensor(order)
            return None
        if count != len(class_names):
            return f"the teacher {self.name} tells {count} classes apart, and the data has {len(class_names)}"
        return None

    def check_classes(self, class_names: list[str]) -> None:
        """Refuse classes it cannot be asked about.

        Raises:
            UsageError: See `why_not`.
        """
        if (reason := self.why_not(class_names)) is not None:
            raise UsageError(f"{reason}; train a classifier on this data first (patchloom adapt) and name its run")

    def in_order(self, logits: Tensor) -> Tensor:
        """Return the model's logits (B, C) in the order of the classes `why_not` was asked about."""
        return logits if self.order is None else logits[:, self.order]

    def view(
        self, images: Tensor, student: Encoder, interpolation: Interpolation = "bilinear", antialias: bool = True
    ) -> Tensor:
        """Return the student's images as the teacher takes them.

        Args:
            images: (B, C, H, W), or clips (B, C, T, H, W), normalised for the student.
            student: Its `pretrained_cfg` says how they were normalised.
            interpolation: How they are resized, where sizes differ.
            antialias: Smooth before they are made smaller.

        Returns:
            (B, C, H', W'), normalised for the teacher.
        """
        teacher_statistics, student_statistics = (
            {k: tuple(m.pretrained_cfg[k]) for k in ("mean", "std")} for m in (self.model, student)
        )
        if teacher_statistics != student_statistics:
            images = normalize(denormalize(images, student), self.model)
        if images.shape[-2:] != self.size[-2:]:
            planes = images if images.ndim == 4 else images.transpose(1, 2).flatten(0, 1)  # frames, each by itself
            size = list(self.size[-2:])
            planes = F.interpolate(planes, size, mode=interpolation, antialias=antialias, align_corners=False)
            images = planes if images.ndim == 4 else planes.unflatten(0, (len(images), -1)).transpose(1, 2)
        return images

    @torch.no_grad()
    def forward(self, view: Tensor) -> Tensor:
        """Return logits (B, C) for images as `view` gives them."""
        return self.in_order(self.model(view))


def denormalize(images: Tensor, model: Encoder) -> Tensor:
    """Return images normalised for a model as they were, in [0, 1]; the inverse of `encoders.normalize`."""
    shape = (1, images.shape[1], *(1 for _ in images.shape[2:]))
    zero, one = (normalize(images.new_full(shape, value), model) for value in (0.0, 1.0))
    return (images - zero) / (one - zero)


def open_teacher(name: str, *, size: Size | None = None, channels: int = 3) -> tuple[FrozenTeacher, list[str]]:
    """Return a teacher as a user names it.

    Args:
        name: Path of a bundle or run, or a timm model, whose published weights are fetched.
        size: Side of the images it is shown, or (height, width), in pixels; default: what it was made for.
        channels: Channels of the images.

    Returns:
        The teacher, and in words what was done to it that its results depend on.

    Raises:
        UsageError: There is no such model, it has no weights, or it takes other images.
    """
    model = _open(name)
    if in_chans(model) != channels:
        raise UsageError(
            f"the teacher {name} takes images of {in_chans(model)} channels, not {channels}; set in_chans, or take "
            f"another teacher"
        )
    trained = input_size(model)[-2:]
    notices = []
    if size is not None and pair(size) != trained:
        before = grid_size(model) if has_tokens(model) else None
        set_image_size(model, size)
        if before is not None:
            notices.append(
                f"the teacher's positions were resampled from {shown(before)} to {shown(grid_size(model))} patches for "
                f"images of {size_text(size)} pixels; it was trained with {size_text((trained[0], trained[1]))}"
            )
    return FrozenTeacher(model, name), notices


def _open(name: str) -> Any:
    if Path(name).exists():
        return load(name)
    if not timm.is_model(name):
        raise UsageError(f"there is no teacher {name!r}; give the path of a bundle or run, or the name of a timm model")
    if not timm.models.is_model_pretrained(name):
        raise UsageError(f"the teacher {name} has no published weights; give the path of a bundle or run")
    return fetch_encoder(name, timm.create_model)


class DistillMethod(SupervisedMethod):
    """Teaching of a classifier by one that knows the same images. Checkpoints do not hold the teacher.

    Attributes:
        teacher: The frozen teacher.
        notices: What the user should know of how student and teacher were fitted to each other.
    """

    config: DistillConfig

    def __init__(self, config: DistillConfig, source: Source | StreamSource) -> None:
        super().__init__(config, source)
        if self.targets.kind == "multi":
            raise UsageError(f"a teacher of classes cannot teach several labels per image, as {config.data} has them")
        self.notices: list[str] = []
        self.teacher, notices = open_teacher(config.teacher, size=config.teacher_image_size, channels=config.in_chans)
        for notice in notices:
            self.notice(notice)
        if (kind := kind_of(self.teacher.model)) != kind_of(self.encoder):
            raise UsageError(
                f"the teacher {config.teacher} takes {KINDS[kind].plural}, and the student "
                f"{KINDS[kind_of(self.encoder)].plural}; take two of one kind"
            )
        size, student_size = self.teacher.size, self.sample_size
        if size[:-2] != student_size[:-2]:
            remedy = (
                f"clip_frames={size[0]} gives both as many frames" if kind == "clip" else "give both as many slices"
            )
            raise UsageError(
                f"the teacher {config.teacher} is set up for {shown(size)} and the student for {shown(student_size)}; "
                f"{remedy}"
            )
        if size != student_size:
            (h, w), (own_h, own_w) = size[-2:], student_size[-2:]
            stretched = "" if own_h * w == own_w * h else ", out of proportion"
            self.notice(
                f"{self.source.kind.plural} of {size_text((own_h, own_w))} pixels are resized to {size_text((h, w))} "
                f"for the teacher{stretched}"
            )

    def notice(self, text: str) -> None:
        """Say something once, now on the error stream and later in the report."""
        self.notices.append(text)
        if is_first_process():
            print(f"note: {text}", file=sys.stderr)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        leave_out(checkpoint, "teacher", self.teacher)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        put_back(checkpoint, "teacher", self.teacher, f"the teacher {self.config.teacher}")

    def lineage(self) -> dict[str, Any]:
        """Return who taught the model."""
        name = self.config.teacher
        lineage: dict[str, Any] = {}
        with suppress(UsageError):  # a timm name, or an adapter, which keeps no lineage in timm's layout
            lineage = read_lineage(name)
        return {"teacher": {"path": name, "lineage": lineage}}

    def describe(self) -> dict[str, Any]:
        """Return what the log and the report say about the model, and the teacher's size."""
        return {**super().describe(), "teacher_parameters": sum(p.numel() for p in self.teacher.parameters())}

    def summary(self) -> dict[str, Any]:
        """Return what the run learnt from, and how often teacher and student are right and agree."""
        return {**super().summary(), "teacher": self.config.teacher, "notices": self.notices, **self.compared()}

    def asks_teacher(self) -> bool:
        """Return whether the teacher's answers mean the data's classes."""
        return self.teacher.why_not(self.class_names) is None

    @torch.no_grad()
    def compared(self) -> dict[str, float]:
        """Return how well the teacher does on the test images, and how often both make the same choice.

        These are `teacher_accuracy`, `teacher_balanced_accuracy` and `agreement`.
        """
        if self.test is None or not self.asks_teacher():
            return {}
        if not hasattr(self, "_compared"):
            student = self.bundle_model()
            logits, labels = self.outputs(lambda images: student(normalize(images, student)), self.device, student)
            taught, _ = self.outputs(self._of_teacher, self.device, self.teacher)
            choice = taught.argmax(1)
            scores = class_scores(choice, labels)
            self._compared = {
                "teacher_accuracy": scores.accuracy,
                "teacher_balanced_accuracy": scores.balanced_accuracy,
                "agreement": float((choice == logits.argmax(1)).float().mean()),
            }
        return self._compared

    def _of_teacher(self, images: Tensor) -> Tensor:
        """Return the teacher's logits for images in [0, 1] of the student's size."""
        logits: Tensor = self.teacher(self.teacher.view(normalize(images, self.encoder), self.encoder))
        return logits

    def report_sections(self, images: Tensor) -> list[Section]:
        """Return how teacher and student compare, and the figures of each class."""
        from patchloom.report import Section

        about, compared = self.describe(), self.compared()
        share = about["parameters"] / about["teacher_parameters"]
        text = [f"The student has {about['parameters']:,} parameters, {share:.1%} of its teacher's."]
        if compared:
            text.append(
                f"On the same images the teacher is right for {compared['teacher_accuracy']:.1%} (balanced accuracy "
                f"{compared['teacher_balanced_accuracy']:.1%}), and both say the same for {compared['agreement']:.1%}."
            )
        text += [f"{notice[0].upper()}{notice[1:]}." for notice in self.notices]
        return [Section(title="Teacher and student", text=" ".join(text)), *super().report_sections(images)]
