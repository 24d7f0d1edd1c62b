"""What an encoder said of each test image: what intervals are drawn from, and two encoders are compared by.

>>> Predictions.load("knn.npz").interval()  # doctest: +SKIP
Interval(value=0.71, low=0.69, high=0.73, redrawn=0)
"""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from patchloom.errors import UsageError, unknown_name
from patchloom.evaluate.config import Resample, check_free, check_resample
from patchloom.io import written_whole
from patchloom.statistics.intervals import FEW_GROUPS, Interval, bootstrap_interval
from patchloom.statistics.metrics import SCORES, Score

Array = np.ndarray


@dataclass(frozen=True)
class Predictions:
    """What was said of each test image, or measured on each query or episode."""

    keys: list[str]
    """Names of the n images (queries, episodes)."""
    predicted: Array
    """(n,) int64 classes; (n, L) scores of labels; or (n,) values where the score is a mean of them."""
    targets: Array
    """(n,) int64 true classes; (n, L) true labels, NaN where unknown; zeros where `predicted` are values."""
    score_name: str
    """Which of `metrics.SCORES` is reported."""
    class_names: list[str] = field(default_factory=list)
    """Names of the classes or labels."""
    scores: Array | None = None
    """(n, C) votes or logits of each class, where `predicted` are classes."""
    about: dict[str, Any] = field(default_factory=dict)
    """Encoder, data and protocol."""
    groups: Array | None = None
    """(n,) integers: the patient, slide or scene of each image, where intervals are to draw whole ones"""

    def __post_init__(self) -> None:
        """Refuse what does not belong together."""
        if self.score_name not in SCORES:
            raise unknown_name("score", self.score_name, SCORES)
        if not len(self.keys) == len(self.predicted) == len(self.targets):
            lengths = f"{len(self.keys)} names, {len(self.predicted)} predictions, {len(self.targets)} targets"
            raise UsageError(f"predictions do not belong together: {lengths}")

    @property
    def score(self) -> Score:
        """The score that is reported."""
        return SCORES[self.score_name]

    def interval(
        self, score: Score | None = None, *, draws: int = 1000, seed: int = 0, resample: Resample = "images"
    ) -> Interval:
        """Return a score (default: the one reported) with its interval, over whole groups where there are some.

        Raises:
            UsageError: Classes are to be resampled, and images have several labels.
        """
        chosen = score or self.score
        given = self.scores if chosen.needs == "scores" and self.scores is not None else self.predicted
        return bootstrap_interval(
            chosen, given, self.targets, strata=self.strata(resample), groups=self.groups, draws=draws, seed=seed
        )

    def strata(self, resample: Resample) -> Array | None:
        """Return what draws keep the shares of, see `bootstrap_interval`.

        Raises:
            UsageError: As for `interval`.
        """
        check_resample(resample)
        if resample == "images" or self.groups is not None:
            return None
        if self.targets.ndim != 1 or self.targets.dtype.kind not in "iub":
            raise UsageError("resample is classes, and these images have no single class each; leave it at images")
        return self.targets

    def doubts(self) -> list[str]:
        """Return, in words, why the intervals are not to be trusted; nothing where they are."""
        if self.groups is not None and (count := len(np.unique(self.groups))) < FEW_GROUPS:
            return [f"{count} group{'s' * (count != 1)} of test images are too few for an interval to be trusted"]
        if len(self.keys) < 2:
            return ["one test image has no interval but that of a share"]
        if self.targets.ndim != 1 or not self.class_names:
            return []
        shown = np.bincount(self.targets.astype(np.int64), minlength=len(self.class_names))
        absent = [name for name, count in zip(self.class_names, shown, strict=False) if not count]
        more = f" and {len(absent) - 3} more" if len(absent) > 3 else ""
        text = f"no test image of {', '.join(absent[:3])}{more}: figures and intervals say nothing of them"
        return [text] if absent else []

    def ordered_like(self, other: Predictions) -> Predictions:
        """Return the predictions in the order of others of the same images.

        Raises:
            UsageError: They are not of the same images, or these have other true classes there.
        """
        ours, theirs = self._names(), other._names()
        if self.keys != other.keys:
            missing = sum(key not in set(self.keys) for key in other.keys)
            if missing or len(self.keys) != len(other.keys):
                raise UsageError(
                    f"{ours} and {theirs} were measured on different images ({len(self.keys)} and {len(other.keys)}, "
                    f"{missing} of the latter not among the former); measure both on the same"
                )
            place = {key: number for number, key in enumerate(self.keys)}
            order = np.array([place[key] for key in other.keys])
            scores = None if self.scores is None else self.scores[order]
            groups = None if self.groups is None else self.groups[order]
            ordered = Predictions(
                list(other.keys),
                self.predicted[order],
                self.targets[order],
                self.score_name,
                self.class_names,
                scores,
                self.about,
                groups,
            )
        else:
            ordered = self
        if not np.array_equal(ordered.targets, other.targets, equal_nan=other.targets.dtype.kind == "f"):
            raise UsageError(f"{ours} and {theirs} have different true labels for the same images; measure both anew")
        return ordered

    def save(self, path: str | Path) -> Path:
        """Write a .npz file, whole or not at all; it must not exist yet.

        Raises:
            UsageError: It exists, or has another ending.
        """
        target = Path(path)
        check_free(target)
        arrays: dict[str, Array] = {
            "keys": np.array(self.keys, dtype=np.str_),
            "predicted": self.predicted,
            "targets": self.targets,
            "class_names": np.array(self.class_names, dtype=np.str_),
            "about": np.array(json.dumps({**self.about, "score_name": self.score_name}, default=str)),
        }
        if self.scores is not None:
            arrays["scores"] = self.scores.astype(np.float32)
        if self.groups is not None:
            arrays["groups"] = self.groups
        with written_whole(target) as temporary:
            np.savez(temporary, **arrays)  # type: ignore[arg-type]
        return target

    @classmethod
    def load(cls, path: str | Path) -> Predictions:
        """Read a file written by `save`.

        Raises:
            UsageError: There is no such file, or it holds something else.
        """
        try:
            with np.load(Path(path), allow_pickle=False) as saved:
                about = json.loads(str(saved["about"]))
                return cls(
                    [str(key) for key in saved["keys"]],
                    saved["predicted"],
                    saved["targets"],
                    about.pop("score_name"),
                    [str(name) for name in saved["class_names"]],
                    saved.get("scores"),
                    about,
                    saved.get("groups"),
                )
        except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
            if isinstance(error, UsageError):
                raise
            raise UsageError(
                f"{path} holds no predictions ({type(error).__name__}); write some with: patchloom evaluate knn "
                f"… --predictions {path}"
            ) from error

    def _names(self) -> str:
        return str(self.about.get("encoder", "one encoder"))
