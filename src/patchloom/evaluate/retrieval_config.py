"""Settings of image retrieval."""

from __future__ import annotations

from dataclasses import dataclass

from patchloom.errors import UsageError
from patchloom.evaluate.config import EvaluationConfig


@dataclass(frozen=True, kw_only=True)
class RetrievalConfig(EvaluationConfig):
    """Settings of retrieval: images of train are looked for by those of test."""

    ks: tuple[int, ...] = (1, 5, 10)
    """Numbers of images returned for which recall is given"""

    def __post_init__(self) -> None:
        """Refuse values that cannot be."""
        super().__post_init__()
        if not self.ks or min(self.ks) < 1:
            raise UsageError(f"ks is {self.ks}; name at least one number of images, each at least 1")
