"""What a teacher says of every image, kept on disk: the second run with the same teacher and images starts at once.

One answer per image can be kept only where the teacher always sees the same view of it; then it is computed once,
before training, and mapped from the disk. Answers lie in the cache of features (`patchloom cache` lists and clears
both) and are found by content: every weight of the teacher, the size and the normalisation of what it sees, and the
fingerprint of the images.

>>> answers = teacher_answers(teacher, open_source("digits"), image_size=32)  # doctest: +SKIP
>>> answers.of(["digits/3", "digits/7"]).shape  # doctest: +SKIP
torch.Size([2, 10])
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from patchloom.base.progress import track
from patchloom.base.sizes import Size
from patchloom.data import make_loader
from patchloom.data.base import Source, StreamSource
from patchloom.data.pixels import unit
from patchloom.encoders import normalize
from patchloom.encoders.patches import Grid
from patchloom.errors import UsageError
from patchloom.features.cache import cache_folder, kept_rows
from patchloom.features.extract import Features, Take, rows_in_memory
from patchloom.features.fingerprint import source_hash, weights_hash
from patchloom.training.answers_config import AnswersConfig
from patchloom.training.teachers import DistillMethod


class TeacherAnswers:
    """One row for every image, by its name.

    Args:
        found: Rows and names.
        name: Of the images, for the error.

    Raises:
        UsageError: Two images have one name.
    """

    def __init__(self, features: Features, name: str) -> None:
        self.rows = features.vectors
        self.name = name
        self.place = {key: row for row, key in enumerate(features.keys)}
        if len(self.place) != len(features.keys):
            raise UsageError(f"images of {name} share names, so a teacher's answers cannot be told apart")

    def of(self, keys: Sequence[str]) -> Tensor:
        """Return the rows (B, D) float32 of images by name.

        Raises:
            UsageError: An image that could not be read when the answers were made.
        """
        try:
            rows = np.array([self.place[key] for key in keys], dtype=np.int64)
        except KeyError as error:
            raise UsageError(
                f"the teacher has no answer for {error.args[0]} of {self.name}, which could not be read when the "
                f"answers were kept; mend the image and delete them (patchloom cache --clear)"
            ) from error
        return self.rows[torch.from_numpy(rows)]


def teacher_answers(
    teacher: Any,
    source: Source | StreamSource,
    *,
    image_size: Size | Grid,
    cache: str | Path | None = "auto",
    name: str | None = None,
    batch_size: int = 128,
    num_workers: int = 2,
    device: torch.device | str = "cpu",
) -> TeacherAnswers:
    """Return a teacher's logits of the evaluation view (resized, centre cut out) of every image of a source.

    Args:
        teacher: A classifier of timm or of this package, whose `pretrained_cfg` says how images are normalised.
        source: The images.
        image_size: Side of the view in pixels, or (height, width); of clips (T, H, W).
        cache: Folder of the cache; `auto` is its usual place, `none` keeps the answers in memory.
        name: What the user calls the teacher: answers of the same name that are out of date are replaced.
        batch_size: Images at a time.
        num_workers: Processes that read images.
        device: Where the teacher computes; it is left there, in eval mode.

    Raises:
        UsageError: The images come as a stream, none can be read, or the place of the cache is a file.
    """
    if isinstance(source, StreamSource):
        raise UsageError(f"{source.name} is a stream; a teacher's answers are kept for images in folders only")
    view = source.kind.eval_view("crop", image_size)

    @torch.no_grad()
    def produce(take: Take) -> list[tuple[str, str]]:
        skipped: list[tuple[str, str]] = []
        loader = make_loader(source, view, batch_size, seed=0, shuffle=False, num_workers=num_workers)
        teacher.eval().to(device)
        with torch.autocast(torch.device(device).type, enabled=False):
            for batch in track(loader, "teacher", unit="batch"):
                skipped += batch["skipped"]
                if batch["key"]:
                    images = normalize(unit(batch[source.kind.name].to(device)), teacher)
                    take(teacher(images).float().cpu(), batch["label"], batch["key"])
        return skipped

    about = {
        "format": 1,
        "encoder": weights_hash(teacher),
        "source": source_hash(source),
        "how": {"answers": "logits", "view": repr(view)},
    }
    root = cache_folder(cache)
    features = None if root is None else kept_rows(root, about, name, source.name, produce)
    return TeacherAnswers(rows_in_memory(produce) if features is None else features, source.name)


class AnswersMethod(DistillMethod):
    """Learning of a teacher's answers, asked in every step or once per image."""

    config: AnswersConfig
    cached_answers: TeacherAnswers | None = None

    def prepare(self, source: Source | StreamSource, run_dir: Path) -> None:
        """Ask the teacher about all images in one process, where the answers are to be found on disk by the others."""
        super().prepare(source, run_dir)
        if self.config.cache_teacher:
            self.ask()

    def load_prepared(self, run_dir: Path) -> None:
        """Have the teacher's answers ready, where it is asked once per image."""
        super().load_prepared(run_dir)
        if self.config.teacher_view == "fixed":
            self.cached_answers = self.ask()

    def ask(self) -> TeacherAnswers:
        """Return the teacher's answers about all images, from disk where they are kept there."""
        config = self.config
        return teacher_answers(
            self.teacher.model,
            self.source,
            image_size=self.teacher.size,
            cache=config.cache if config.cache_teacher else None,
            name=config.teacher,
            batch_size=config.batch_size,
            num_workers=config.num_workers,
            device=self.trainer.strategy.root_device,
        )

    def answers(self, batch: dict[str, Any], images: Tensor) -> Tensor:
        """Return the teacher's logits (B, C) of a batch.

        Args:
            batch: What the loader gave.
            images: (B, C, H, W), its images as the student sees them.
        """
        if self.cached_answers is None:
            answered: Tensor = self.teacher(self.teacher.view(images, self.encoder))
            return answered
        return self.teacher.in_order(self.cached_answers.of(batch["key"]).to(images.device))
