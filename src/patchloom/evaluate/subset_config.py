"""Settings of evaluations that may learn from a few labelled images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from patchloom.errors import UsageError, unknown_name
from patchloom.evaluate.config import EvaluationConfig

Protocol = Literal["dinov2", "dinov3", "radiology", "nested"]


@dataclass(frozen=True, kw_only=True)
class SubsetConfig(EvaluationConfig):
    """Settings of an evaluation that may learn from a part of the training images."""

    shots: float | None = None
    """Labelled images per class to learn from, or below 1 (dinov3) the share of each class; default: all of train"""
    shots_by: Protocol = "dinov2"
    """How they are drawn, the seed being the number of the try: dinov2, dinov3, nested (more contain fewer), radiology
    (so many in all, evenly spaced, or of each label so many patients)"""
    patients: str | None = None
    """CSV file (columns key, group) of the patients of the training images, for shots_by=radiology"""

    def __post_init__(self) -> None:
        """Refuse values that cannot be."""
        super().__post_init__()
        if self.shots is not None:
            check_shots(self.shots, self.shots_by, self.patients is not None)
        elif self.patients is not None:
            raise UsageError("patients is for shots of whole patients; give shots, and shots_by=radiology")

    def drawn(self) -> dict[str, Any]:
        """Return what goes with the figures of an evaluation that learnt from a part."""
        return {} if self.shots is None else {"shots": self.shots, "shots_by": self.shots_by}


def check_shots(shots: float, protocol: str, patients: bool = False) -> None:
    """Refuse a number of shots that a protocol does not know.

    Raises:
        UsageError: Names what would be right.
    """
    if protocol not in get_args(Protocol):
        raise unknown_name("way to draw shots", protocol, get_args(Protocol))
    if patients and protocol != "radiology":
        raise UsageError(f"{protocol} draws images, not patients; leave patients out, or take radiology")
    share = protocol == "dinov3" and 0 < shots < 1
    if not share and (shots < 1 or shots != int(shots)):
        raise UsageError(f"shots is {shots:g}; {protocol} takes a whole number, at least 1; dinov3 a share below 1 too")
