"""Settings of learning from answers that may be kept on disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from patchloom.errors import UsageError
from patchloom.training.distill_config import DistillConfig


def refuse_random_views(settings: Mapping[str, float | str | None]) -> None:
    """Refuse to ask once per image where images are mixed, or the teacher sees each as it was augmented.

    Args:
        settings: What makes a view random, by the name of its setting; 0, None and "" stand for off.

    Raises:
        UsageError: One of them is on.
    """
    on = [
        f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}"
        for name, value in settings.items()
        if value
    ]
    if on:
        raise UsageError(
            f"a teacher is asked once per image, and with {', '.join(on)} it would see another view every time; set "
            f"teacher_view=fixed, mixup=0 and cutmix=0, or leave cache_teacher out"
        )


@dataclass(frozen=True, kw_only=True)
class AnswersConfig(DistillConfig):
    """Settings of learning a teacher's answers, which can be kept."""

    teacher_view: Literal["augmented", "fixed"] = "augmented"
    """What the teacher is shown: each image as the student sees it, or always as it is evaluated, asked once per image
    before training (for a run without mixup and cutmix)"""
    cache_teacher: bool = False
    """Keep these answers on disk, so that the next run with the same teacher and images starts at once; for
    teacher_view=fixed"""
    cache: str = "auto"
    """Folder of kept answers; auto is that of kept features, see patchloom cache"""

    def __post_init__(self) -> None:
        """Refuse views that change and are to be kept."""
        super().__post_init__()
        if self.teacher_view == "fixed" or self.cache_teacher:
            fixed = {"mixup": self.mixup, "cutmix": self.cutmix}
            changing = {**fixed, "teacher_view": "augmented" if self.teacher_view == "augmented" else None}
            refuse_random_views(changing)
