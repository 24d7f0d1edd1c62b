"""Tasks on disk: the encoder's bundle, and what each task has beside it.

`gcab.safetensors` holds tokens, heads, gates, projectors and the gated block (of a baseline its heads), `gcab.json` the
classes of each task, the settings and the figures after each task. Nothing can be merged: the encoder goes on changing,
and the projectors are no linear maps. `patchloom.load` gives the whole; who wants an encoder finds the bundle's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from patchloom.encoders import Encoder, depth, image_size, in_chans
from patchloom.errors import UsageError
from patchloom.io import write_json, written_whole
from patchloom.models.bundle import bundle_fingerprint, find_bundle
from patchloom.models.bundle import load as load_bundle
from patchloom.systems.gcab.baselines import LinearHeads, NearestMean
from patchloom.systems.gcab.model import GCAB, Tasks

WEIGHTS, ABOUT = "gcab.safetensors", "gcab.json"
FORMAT = 1
# Parts of the model that the bundle has, or that only training needs.
ELSEWHERE = ("trunk.encoder.", "encoder.", "teacher.")
KEPT = ("num_heads", "mlp_ratio", "steepest", "largest", "compensate", "freeze_encoder", "cascade", "gated")


@dataclass(frozen=True)
class TaskRecord:
    """What is known of a model that learnt tasks besides its tensors."""

    learner: str
    """gcab, finetune, linear or nearest_mean."""
    tasks: list[list[str]]
    """Names of the classes of each task."""
    max_tasks: int
    """Tasks there can be; of a baseline on a frozen encoder nothing hangs on it."""
    settings: dict[str, Any]
    """Arguments of `GCAB`; empty for a baseline on a frozen encoder."""
    class_images: list[int]
    """Images that were learnt from, of each class."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """Figures after each task, see `measures.measured`."""

    @property
    def class_names(self) -> list[str]:
        """All classes, in the order of the outputs."""
        return [name for task in self.tasks for name in task]


def build(encoder: Encoder, learner: str, max_tasks: int, settings: Mapping[str, Any]) -> Tasks:
    """Return what learns, without a task.

    Args:
        encoder: Becomes part of it.
        learner: gcab, finetune, linear or nearest_mean.
        max_tasks: Tasks there can be.
        settings: Arguments of `GCAB`.
    """
    if learner == "linear":
        return LinearHeads(encoder)
    if learner == "nearest_mean":
        return NearestMean(encoder)
    return GCAB(encoder, max_tasks, **settings)


def settings_of(model: Tasks) -> dict[str, Any]:
    """Return the arguments of `GCAB` that build a model of this shape again; none of a baseline on a frozen encoder."""
    if not isinstance(model, GCAB):
        return {}
    attention = model.block.attn
    known = {
        "num_heads": attention.num_heads,
        "mlp_ratio": model.block.hidden / model.trunk.dim,
        "steepest": model.gates.steepest,
        "largest": model.gates.largest,
        "compensate": model.compensates,
        "freeze_encoder": model.freeze_encoder,
        "cascade": model.cascade,
        "gated": model.gated,
    }
    return {name: known[name] for name in KEPT}


def save_tasks(model: Tasks, record: TaskRecord, path: Path) -> None:
    """Write what a model has besides its encoder into the folder of the encoder's bundle."""
    state = {name: value.detach().cpu().contiguous() for name, value in _own(model).items()}
    with written_whole(path / WEIGHTS) as temporary:
        save_file(state, temporary)
    write_json(path / ABOUT, {"format": FORMAT, "encoder": bundle_fingerprint(path), **asdict(record)})


def read_record(path: str | Path) -> TaskRecord:
    """Return what is known of the model of a run or bundle besides its tensors.

    Raises:
        UsageError: There is no bundle, it has no tasks, or the file is damaged or of another encoder.
    """
    folder = find_bundle(path)
    file = folder / ABOUT
    if not file.exists():
        raise UsageError(f"{path} holds no tasks to go on from; give a run of patchloom adapt gcab")
    try:
        about: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        known, encoder = about.pop("format"), about.pop("encoder")
        if known != FORMAT:
            raise UsageError(f"{file} is of format {known}, and this version reads {FORMAT}; update patchloom")
        record = TaskRecord(**about)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{file} is damaged ({' '.join(str(error).split())[:200]}); write the run again") from error
    if encoder != bundle_fingerprint(folder):
        raise UsageError(f"{file} belongs to another encoder than the one beside it; copy the whole folder again")
    return record


def rebuild(encoder: Encoder, record: TaskRecord, path: str | Path, **settings: Any) -> Tasks:
    """Return the model of a run or bundle around its encoder, its tasks in it, filled with its tensors.

    Args:
        encoder: That of the bundle.
        record: What `read_record` returned.
        path: The run or bundle.
        **settings: Arguments of `GCAB` that are only of training.

    Raises:
        UsageError: The tensors are damaged, or not those of such a model.
    """
    folder = find_bundle(path)
    try:
        blocks = {"blocks": depth(encoder)} if record.settings else {}
        model = build(encoder, record.learner, record.max_tasks, {**record.settings, **settings, **blocks})
        for task in record.tasks:
            model.add_task(len(task))
        state = load_file(folder / WEIGHTS)
        own = _own(model)
        if odd := sorted(state.keys() ^ own.keys()):
            raise ValueError(f"missing or left over: {', '.join(odd[:4])}")
        model.load_state_dict(state, strict=False)
    except UsageError:
        raise
    except Exception as error:  # safetensors and shapes fail in ways of their own
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"the tasks in {folder} are damaged ({reason}); write the run again") from error
    if isinstance(model, GCAB):
        model.teacher = None  # that of the next task is made when it begins
    model.class_names, model.task_names = record.class_names, record.tasks
    taken = (in_chans(encoder), *image_size(encoder))
    model.pretrained_cfg = {**encoder.pretrained_cfg, "label_names": record.class_names, "input_size": taken}
    return model


def load_tasks(path: str | Path) -> Tasks:
    """Return the model of a run or bundle, in eval mode: normalised images (B, C, H, W) to logits (B, classes seen).

    Raises:
        UsageError: There is none, or it is damaged.
    """
    return rebuild(load_bundle(path), read_record(path), path).eval()


def _own(model: Tasks) -> dict[str, Tensor]:
    return {name: value for name, value in model.state_dict().items() if not name.startswith(ELSEWHERE)}
