"""Settings of learning classes task after task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from patchloom.base.ranges import NonNegative, Positive, PositiveInt
from patchloom.base.settings import Cited
from patchloom.errors import UsageError
from patchloom.training.options import EncoderOptions
from patchloom.training.supervised_config import AugmentationConfig

ENCODER = "gcab_convit_small_patch4_32"
TASKS = 5
"""Tasks of a run that says nothing else."""
ROOM = 10
"""Tasks that can be added later, where nothing else is said."""
FROZEN = ("linear", "nearest_mean")
"""Learners whose encoder stands still."""


@dataclass(frozen=True, kw_only=True)
class GCABConfig(EncoderOptions, AugmentationConfig):
    """Settings of learning classes task after task; the defaults are the paper's for CIFAR-100."""

    ABLATIONS: ClassVar[tuple[str, ...]] = ("steepest", "clamp", "compensate", "cascade", "strict_protection")
    RECIPE: ClassVar[Mapping[str, Any]] = {
        "encoder": ENCODER,
        "epochs": Cited(500, "of each task; paper: 500"),
        "batch_size": 128,
        "lr": 5e-4,
        "lr_base_batch": 512,
        "min_lr": 1e-5,
        "warmup_epochs": Cited(5.0, "of each task"),
        "weight_decay": 1e-6,
        "betas": (0.9, 0.999),
        "clip_grad": 10_000.0,
        "drop_path": 0.1,
        "precision": Cited("32-true", "paper: 32-true; gates overflow in 16-mixed"),
        "erasing": 0.0,
        "crop_scale": (0.08, 1.0),
        "color_jitter": Cited(0.4, "in force without RandAugment only"),
        "crop_padding": Cited(None, "default here: 4 for images of up to 32 pixels, as published"),
    }

    tasks: PositiveInt | None = None
    """Tasks the classes are divided into, in their order; default: 5, or 1 to go on from a run; paper: 5 to 20"""
    task_file: str | None = None
    """Instead, a YAML file with the classes of each task: a list of lists of names"""
    class_order: str | None = None
    """Order of the classes: seed draws one, names separated by commas give one and leave other classes out; default:
    that of the images"""
    max_tasks: PositiveInt | None = None
    """Tasks there can ever be: gates are made in advance; default: ten more than there are"""
    continue_from: str | None = None
    """Run or bundle of this command to add tasks to; data are images of new classes, old images are not needed"""
    learner: Literal["gcab", "finetune", "linear", "nearest_mean"] = "gcab"
    """What learns: the method, or a baseline on the same tasks: the same network without gates and compensation, or on
    a frozen encoder a linear classifier for each task or the mean of each class"""
    lambda_gate: NonNegative = 0.05
    """Weight of the share of free channels that a task takes"""
    lambda_drift: NonNegative = 0.001
    """Weight of the drift of features; for the whole batch, so that it grows with the square root of batch_size"""
    freeze_encoder: bool = False
    """Let the encoder stand still: nothing drifts, nothing is compensated (not in the paper; for pre-trained ones)"""
    steepest: Positive = 800.0
    """Largest factor in the sigmoid of the gates"""
    clamp: Positive = 6.0
    """Range of the task embeddings that gates are made of"""
    compensate: bool = True
    """Learn networks that lead features back to what earlier tasks knew"""
    cascade: bool = True
    """Use them when classes are told"""
    strict_protection: bool = True
    """Put reserved weights back after each step, as weight decay and momentum know of no mask (not in the paper)"""

    def __post_init__(self) -> None:
        """Refuse values no run can have."""
        super().__post_init__()
        if self.task_file is not None and (self.tasks is not None or self.class_order is not None):
            raise UsageError("task_file has the classes of each task; leave tasks and class_order out")
        if self.precision == "16-mixed":
            raise UsageError(
                "precision=16-mixed cannot hold the gradients of the gates, which are scaled by up to 1e21; use "
                "32-true or bf16-mixed"
            )
        if self.strategy == "fsdp":
            raise UsageError("tasks are learnt in turn, which strategy=fsdp does not allow; use ddp")
        if self.class_weights != "none" or self.label_smoothing:
            raise UsageError(
                "a task is learnt by binary cross-entropy of all classes seen, without weights and smoothing; leave "
                "class_weights and label_smoothing out"
            )
        if self.task not in ("auto", "single"):
            raise UsageError(f"task is {self.task}; classes that come in tasks are one per image, so leave it out")
        if self.continue_from is not None:
            # A resumed run has it as an absolute path, and may be given it as it was.
            if self.encoder != ENCODER and Path(self.encoder).resolve() != Path(self.continue_from).resolve():
                raise UsageError("continue_from brings its own encoder; leave encoder out")
            if self.init_from is not None:
                raise UsageError("continue_from brings its own weights; leave init_from out")
        if self.learner == "nearest_mean" and (self.devices != 1 or self.nodes > 1):
            raise UsageError("class means are taken by one process; set devices and nodes to 1")
        if self.adversary != "none" and self.learner == "nearest_mean":
            raise UsageError("class means do not learn from attacked images; leave adversary out")
