"""Settings of image retrieval."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import MinLen

from patchloom.base.ranges import PositiveInt
from patchloom.evaluate.config import EvaluationConfig


@dataclass(frozen=True, kw_only=True)
class RetrievalConfig(EvaluationConfig):
    """Settings of retrieval: images of train are looked for by those of test."""

    ks: Annotated[tuple[PositiveInt, ...], MinLen(1)] = (1, 5, 10)
    """Numbers of images returned for which recall is given"""
