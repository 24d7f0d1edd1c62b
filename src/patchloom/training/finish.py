"""The end of a run: the bundle, `summary.json` and the report, also when the run was interrupted."""

from __future__ import annotations

import dataclasses
import signal
import sys
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as lp
from lightning.pytorch.callbacks import Callback
from torch import nn

from patchloom.base.progress import duration
from patchloom.base.version import __version__
from patchloom.encoders import Encoder
from patchloom.io import write_json
from patchloom.models.bundle import read_lineage
from patchloom.training.callbacks import Interruption, Probe, SkippedImages
from patchloom.training.method import Method
from patchloom.training.metrics import read_metrics
from patchloom.training.options import start_of
from patchloom.training.report import write_run_report
from patchloom.training.size import Advice


class Finish(Callback):
    """Writes what a run leaves behind; in the first process, inside the process group so that shards can be joined."""

    def __init__(
        self,
        run_dir: Path,
        command: str,
        probe: Probe,
        skipped: SkippedImages,
        interruption: Interruption,
        advice: Advice,
    ) -> None:
        self.run_dir = run_dir
        self.command = command
        self.probe = probe
        self.skipped = skipped
        self.interruption = interruption
        self.advice = advice

    def on_fit_end(self, trainer: lp.Trainer, pl_module: lp.LightningModule) -> None:
        """Write bundle, summary and report."""
        assert isinstance(pl_module, Method)
        model = self.shipped(trainer, pl_module)
        if not trainer.is_global_zero:
            return
        for logger in trainer.loggers:
            logger.save()
        lineage = self.lineage(pl_module, pl_module.step)
        pl_module.save_model(cast(Encoder, model), self.run_dir / "model", lineage)
        summary = self.summary(trainer, pl_module)
        try:
            if pl_module.config.report:
                print("writing the report …", file=sys.stderr)
                write_run_report(self.run_dir, self.command, pl_module, self.probe, summary)
        except Exception:  # a picture that cannot be drawn must not take the figures along
            write_json(self.run_dir / "summary.json", summary, default=str)
            raise
        write_json(self.run_dir / "summary.json", summary, default=str)  # last: it says that the run is complete

    def interrupted(self, unfinished: bool) -> dict[str, Any]:
        """Return whether a signal ended the run before its time, and which."""
        number = self.interruption.number
        if number is None or not unfinished:
            return {"interrupted": False}
        return {"interrupted": True, "stopped_by": signal.Signals(number).name}

    def shipped(self, trainer: lp.Trainer, method: Method) -> nn.Module:
        """Return the model to ship, put together from shards where it is sharded."""
        if method.config.strategy != "fsdp":
            model: nn.Module = method.bundle_model()
            for part in method.attached:
                model = part.fold(model)
            return model
        prefix = next((part.ships for part in method.attached if part.ships is not None), "encoder.")
        state = trainer.strategy.lightning_module_state_dict()
        model = method.build_encoder()
        model.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
        return model

    def lineage(self, method: Method, steps: int) -> dict[str, Any]:
        """Return what made the model, and from which bundle."""
        config = method.config
        # A timm model's published weights are named by it, and have no lineage here.
        parent = start_of(config) or (config.encoder if Path(config.encoder).exists() else None)
        return {
            "made_by": self.command,
            "data": method.source.describe(),
            "steps": steps,
            "settings": dataclasses.asdict(config),
            "from": None if parent is None else {"path": parent, "lineage": _lineage_of(parent)},
            **method.lineage(),
        }

    def summary(self, trainer: lp.Trainer, method: Method) -> dict[str, Any]:
        """Return the final figures."""
        rows = read_metrics(self.run_dir / "metrics.csv")
        last: dict[str, float] = {}
        for row in rows:
            last |= row
        known = {"step", "epoch", "lr", "weight_decay"}
        seconds = method.seconds()
        images = method.batches_done * method.config.batch_size * trainer.world_size
        return {
            "command": self.command,
            "patchloom": __version__,
            **method.describe(),
            "data": method.source.describe(),
            "left_out_per_epoch": method.images_left_out,
            "repeated_per_epoch": method.images_repeated,
            "steps": method.step,
            "total_steps": method.total_steps,
            **self.interrupted(method.step < method.total_steps),
            **{name: value for name, value in last.items() if name not in known},
            **self.probe.latest,
            **method.summary(),
            **{name: value for part in method.attached for name, value in part.summary(method).items()},
            "advice": self.advice.lines,
            "unreadable_images": len(self.skipped.reasons),
            "images_per_second": round(images / seconds, 1),
            "seconds": round(seconds, 1),
            "duration": duration(seconds),
        }


def _lineage_of(parent: str) -> dict[str, Any]:
    return read_lineage(parent) if Path(parent).exists() else {}
