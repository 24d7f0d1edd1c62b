"""Settings of the evaluation that trains the encoder further."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from patchloom.errors import UsageError
from patchloom.evaluate.config import EvaluationConfig

# Settings of training that this evaluation sets itself.
OURS = ("data", "test", "encoder", "out", "seed", "num_workers", "image_size", "in_chans", "accelerator")


@dataclass(frozen=True, kw_only=True)
class FinetuneEvaluationConfig(EvaluationConfig):
    """Settings of the evaluation by training further."""

    method: str = "finetune"
    """Method of patchloom adapt: finetune, lora, bitfit, vpt, adaptformer, linear …"""
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings of that method, such as --settings.epochs 10 --settings.lr 1e-3"""
    run: str | None = None
    """Folder where the run is kept, and gone on with by the same command once it was stopped; default: it is deleted"""

    def __post_init__(self) -> None:
        """Refuse values that cannot be."""
        super().__post_init__()
        if self.view != "crop":
            raise UsageError(f"view is {self.view}, and training chooses its own views; leave it out")
        if taken := [name for name in self.settings if name in OURS]:
            raise UsageError(f"settings holds {taken[0]}, which the evaluation sets itself; leave it out")
