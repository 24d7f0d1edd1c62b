"""Choosing a head by cross-validation, and keeping the models that were trained on the way as an ensemble.

Repeated folds that keep a patient's slides together, a grid of learning rate and weight decay, the epoch by the mean
validation curve, as the published code of Phikon-v2's group (owkin/HistoSSLscaling) has them; the ensemble is
Phikon-v2's (Filiot et al. 2024, arXiv 2409.09173).

>>> ensemble = cross_validate_mil(bags, labels, patients, Task("binary", ("no", "yes")))  # doctest: +SKIP
>>> ensemble.predict(other_bags)  # probabilities, the mean over 15 models  # doctest: +SKIP
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import save_file
from sklearn.model_selection import StratifiedGroupKFold
from torch import Tensor

from patchloom.base.choices import Average
from patchloom.base.progress import track
from patchloom.base.stored import read_tensors
from patchloom.errors import UsageError
from patchloom.evaluate.slides.fit import FitSettings, fit, make_head, predict_logits
from patchloom.evaluate.slides.tasks import Task
from patchloom.io import make_folder, write_json
from patchloom.systems.phikon_v2.mil import MILHead

GRID = {"lr": (1e-3, 1e-4), "weight_decay": (0.0, 1e-4)}
"""The published grid."""


@dataclass
class MILEnsemble:
    """Heads whose answers are averaged."""

    heads: list[MILHead] = field(repr=False)
    """The members."""
    task: Task
    """What they answer."""
    settings: FitSettings
    """How they were trained; `epochs` is the number chosen."""
    choice: dict[str, Any] = field(default_factory=dict)
    """How the settings were chosen: for each point of the grid its mean validation curve, and the best epoch."""
    folds: list[np.ndarray] = field(default_factory=list, repr=False)
    """For each member the bags it has not seen, where it comes from cross-validation."""

    def member_logits(self, bags: Sequence[Tensor]) -> np.ndarray:
        """Return the logits of each member, (members, bags, out)."""
        return np.stack([predict_logits(head, bags, self.settings.device) for head in self.heads])

    def predict(self, bags: Sequence[Tensor], average: Average = "probabilities") -> np.ndarray:
        """Return probabilities (bags,) or (bags, classes), or risks (bags,).

        Args:
            bags: (n_i, D) each.
            average: What is averaged over the members; risks are averaged as they are.
        """
        return self.averaged(self.member_logits(bags), average)

    def averaged(self, logits: np.ndarray, average: Average = "probabilities") -> np.ndarray:
        """Return what `predict` does, of the logits of each member."""
        if average == "logits":
            return self.task.scores(logits.mean(0))
        scores: np.ndarray = np.stack([self.task.scores(each) for each in logits]).mean(0)
        return scores

    def unseen_scores(self, bags: Sequence[Tensor]) -> np.ndarray:
        """Return for each bag of the cross-validation the mean over the members that have not seen it."""
        logits = self.member_logits(bags)
        total: np.ndarray = np.zeros(0)
        counts = np.zeros(len(bags))
        for each, unseen in zip(logits, self.folds, strict=True):
            scores = self.task.scores(each)
            total = total if len(total) else np.zeros_like(scores)
            total[unseen] += scores[unseen]
            counts[unseen] += 1
        return total / counts.reshape(-1, *[1] * (total.ndim - 1))

    def save(self, path: str | Path) -> Path:
        """Write the members and what they are to a folder.

        Raises:
            UsageError: The folder exists.
        """
        folder = Path(path)
        if folder.exists():
            raise UsageError(f"{folder} exists; choose another folder")
        make_folder(folder)
        for number, head in enumerate(self.heads):
            state = {name: value.detach().cpu().contiguous() for name, value in head.state_dict().items()}
            save_file(state, folder / f"member-{number:02d}.safetensors")
        about = {
            "settings": {**asdict(self.settings), "head_args": dict(self.settings.head_args)},
            "task": asdict(self.task),
            "in_features": self.heads[0].in_features,
            "members": len(self.heads),
            "choice": self.choice,
        }
        write_json(folder / "ensemble.json", about)
        return folder

    @staticmethod
    def load(path: str | Path) -> MILEnsemble:
        """Read what `save` wrote.

        Raises:
            UsageError: There is no ensemble.
        """
        file = Path(path) / "ensemble.json"
        if not file.is_file():
            raise UsageError(f"there is no ensemble of heads in {path}")
        about = json.loads(file.read_text(encoding="utf-8"))
        settings, task = FitSettings(**about["settings"]), Task(about["task"]["kind"], tuple(about["task"]["classes"]))
        heads = []
        for number in range(about["members"]):
            head = make_head(settings, about["in_features"], task.out_features)
            head.load_state_dict(read_tensors(Path(path) / f"member-{number:02d}.safetensors"))
            heads.append(head.eval())
        return MILEnsemble(heads, task, settings, about["choice"])


def cross_validate_mil(
    bags: Sequence[Tensor],
    labels: np.ndarray,
    groups: Sequence[str],
    task: Task,
    settings: FitSettings | None = None,
    *,
    grid: dict[str, Sequence[float]] | None = None,
    folds: int = 5,
    repeats: int = 3,
    epoch_as_published: bool = False,
    progress: bool = True,
) -> MILEnsemble:
    """Choose settings by repeated cross-validation; return the models of the best ones.

    Every point of the grid is trained on every fold; the mean of its validation curves is judged by its best epoch.
    The models of the best point are trained once more, for as many epochs.

    Args:
        bags: (n_i, D) each.
        labels: (bags,) class numbers or signed times.
        groups: Patient of each bag.
        task: What is asked.
        settings: How heads are trained; lr and weight_decay are those of the grid.
        grid: Values of settings to try; default: the published grid.
        folds: Parts of the patients.
        repeats: Times they are parted anew.
        epoch_as_published: Train for as many epochs as the index of the best one, counted from 0, as the published
            code does; otherwise up to and including it.
        progress: Say how far it has come.

    Raises:
        UsageError: Fewer patients than folds, in all or of a class.
    """
    settings = settings or FitSettings()
    grid = dict(GRID) if grid is None else grid
    parts = list(split_patients(labels, groups, task, folds, repeats))
    points: list[dict[str, Any]] = [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]
    done = iter(track(range((len(points) + 1) * len(parts)), "heads", unit="head", show=progress))
    next(done, None)
    curves = []
    for point in points:
        each = []
        for number, (train_rows, test_rows) in enumerate(parts):
            ours = replace(settings, **point, seed=settings.seed + number)
            held_out = [bags[place] for place in test_rows], labels[test_rows]
            each.append(fit([bags[place] for place in train_rows], labels[train_rows], task, ours, held_out)[1])
            next(done, None)
        curves.append(_mean_curve(each))
    best = max(range(len(points)), key=lambda number: (max(curves[number]), -number))
    index = int(np.argmax(curves[best]))
    epochs = max(index, 1) if epoch_as_published else index + 1
    chosen = replace(settings, **points[best], epochs=epochs)
    heads = []
    for number, (train_rows, _) in enumerate(parts):
        ours = replace(chosen, seed=settings.seed + number)
        heads.append(fit([bags[place] for place in train_rows], labels[train_rows], task, ours)[0])
        next(done, None)
    choice = {
        "grid": [{**point, "curve": curve} for point, curve in zip(points, curves, strict=True)],
        "best": best,
        "epochs": epochs,
        "validation": curves[best][index],
    }
    return MILEnsemble(heads, task, chosen, choice, [test_rows for _, test_rows in parts])


def retrain(bags: Sequence[Tensor], labels: np.ndarray, ensemble: MILEnsemble) -> MILEnsemble:
    """Return one model with the settings an ensemble was chosen with, trained on all bags ("one-shot retraining")."""
    return MILEnsemble([fit(bags, labels, ensemble.task, ensemble.settings)[0]], ensemble.task, ensemble.settings)


def nested_cross_validation(
    bags: Sequence[Tensor],
    labels: np.ndarray,
    groups: Sequence[str],
    task: Task,
    settings: FitSettings | None = None,
    *,
    grid: dict[str, Sequence[float]] | None = None,
    folds: int = 5,
    inner_folds: int = 5,
    repeats: int = 5,
    epoch_as_published: bool = False,
) -> list[dict[str, Any]]:
    """Return, for each outer fold, the metric on patients that had no part in choosing settings or epochs.

    Inside each outer fold settings and epochs are chosen by one cross-validation of `inner_folds`, and one model is
    trained with them on all patients of the outer fold's training part.

    Returns:
        For each outer fold of each repeat: `repeat`, `fold`, `metric`, and what was chosen (`lr`, …, `epochs`).

    Raises:
        UsageError: Fewer patients than folds, in all or of a class.
    """
    settings = settings or FitSettings()
    results = []
    for number, (train_rows, test_rows) in enumerate(split_patients(labels, groups, task, folds, repeats)):
        ours = replace(settings, seed=settings.seed + 1000 * (number + 1))
        training = [bags[place] for place in train_rows], labels[train_rows]
        inner = cross_validate_mil(
            training[0],
            training[1],
            [groups[place] for place in train_rows],
            task,
            ours,
            grid=grid,
            folds=inner_folds,
            repeats=1,
            epoch_as_published=epoch_as_published,
            progress=False,
        )
        model = retrain(*training, inner)
        scores = model.predict([bags[place] for place in test_rows])
        chosen = {"lr": model.settings.lr, "weight_decay": model.settings.weight_decay, "epochs": model.settings.epochs}
        place = {"repeat": number // folds, "fold": number % folds}
        results.append({**place, "metric": task.metric(labels[test_rows], scores), **chosen})
    return results


def split_patients(
    labels: np.ndarray, groups: Sequence[str], task: Task, folds: int, repeats: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the bags seen and unseen of each fold of each repeat; the repeat's number is the seed.

    Classes are spread evenly over the folds; for survival, events are.

    Raises:
        UsageError: Fewer patients than folds, in all or of a class.
    """
    if folds < 2 or repeats < 1:
        raise UsageError(f"folds is {folds} and repeats {repeats}; at least 2 and 1 are needed")
    strata = (labels > 0).astype(int) if task.kind == "survival" else labels
    owners = np.asarray(groups)
    names = {0: "censored", 1: "event"} if task.kind == "survival" else dict(enumerate(task.classes))
    for stratum in np.unique(strata):
        patients = len(np.unique(owners[strata == stratum]))
        if patients < folds:
            name = names.get(int(stratum), stratum)
            raise UsageError(f"class {name} has {patients} patients, fewer than {folds} folds; set folds lower")
    for repeat in range(repeats):
        splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=repeat)
        yield from splitter.split(np.zeros(len(labels)), strata, owners)


def _mean_curve(curves: list[list[float]]) -> list[float]:
    """Return the mean over folds, epoch by epoch; a fold whose metric is not defined has no say."""
    table = np.array(curves)
    defined = ~np.isnan(table)
    counts = defined.sum(0)
    sums = np.where(defined, table, 0).sum(0)
    return [float(total / count) if count else 0.0 for total, count in zip(sums, counts, strict=True)]
