"""`patchloom evaluate slides`: how well a slide's label is read off the features of its tiles.

Settings are chosen by repeated cross-validation on the training cohort; all models of the folds answer together on
the test cohort, beside one model trained anew on all training slides (Phikon-v2: Filiot et al. 2024, arXiv 2409.09173).

>>> import patchloom as pl
>>> pl.evaluate("slides", train="features/a", train_labels="a.csv", test="features/b", test_labels="b.csv")
... # doctest: +SKIP
{'protocol': 'slides', 'score': 0.87, 'interval': [0.81, 0.92], …}
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from patchloom.errors import UsageError
from patchloom.evaluate.slides.bags import Cohort, read_cohort
from patchloom.evaluate.slides.config import SlidesConfig
from patchloom.evaluate.slides.embed import EmbedConfig, run_embed, weights_fingerprint
from patchloom.evaluate.slides.store import TileStore
from patchloom.evaluate.slides.validate import (
    MILEnsemble,
    cross_validate_mil,
    nested_cross_validation,
    retrain,
)
from patchloom.io import make_folder, write_json, write_rows
from patchloom.models.bundle import bundle_fingerprint
from patchloom.statistics.delong import delong
from patchloom.statistics.intervals import Difference, bootstrap_interval, mean_interval, paired_bootstrap


@dataclass
class Answers:
    """What was predicted for each slide of a cohort."""

    cohort: Cohort
    """The cohort."""
    scores: np.ndarray
    """Of the ensemble; (slides,) or (slides, classes)."""
    one_model: np.ndarray | None = None
    """Of the model trained anew on all training slides."""
    members: np.ndarray | None = None
    """(models, slides, …) of each model of the ensemble."""


class Slides:
    """Multiple-instance learning on the tiles of whole slides: cross-validated, ensembled, tested elsewhere."""

    config_class = SlidesConfig
    writes_out = True
    """`out` is a folder, and this class writes it."""

    def __init__(self, config: SlidesConfig) -> None:
        self.config = config

    def run(self) -> dict[str, Any]:
        """Return the score with its interval, and what goes with it."""
        start, config = time.perf_counter(), self.config
        train_store, test_store = self._stores()
        train = self._cohort(train_store, config.train_labels)
        test = None
        if test_store is not None:
            test = self._cohort(test_store, str(config.test_labels), train)
            refuse_unlike(train_store, test_store, train, test)
        ensemble, answers = self._answers(train, test)
        figures = self._figures(ensemble, answers, train)
        if config.nested:
            figures |= self._nested(train, tested=test is not None)
        if config.compare is not None:
            figures["comparison"] = self._comparison(train, answers)
        figures["seconds"] = round(time.perf_counter() - start, 2)
        if config.out is not None:
            self._write(Path(config.out), ensemble, answers, figures, test_store or train_store)
        return figures

    def _stores(self) -> tuple[TileStore, TileStore | None]:
        """Return the features of the cohorts, made now where there is an encoder."""
        config = self.config
        if config.encoder is None:
            return TileStore(config.train), None if config.test is None else TileStore(config.test)
        shared = {f.name: getattr(config, f.name) for f in fields(EmbedConfig) if hasattr(config, f.name)}
        for name in (
            "encoder",
            "out",
            "device",
            "num_workers",
            "batch_size",
        ):  # a batch is of slides here, of tiles there
            shared.pop(name)
        stores = []
        for slides in (config.train, config.test):
            if slides is not None:
                key = f"{slides} {_identity(config.encoder)} {sorted(shared.items(), key=str)}"
                out = Path(config.store) / f"{Path(slides).stem}-{zlib.crc32(key.encode()):08x}"
                run_embed(
                    EmbedConfig(
                        encoder=config.encoder,
                        slides=slides,
                        out=str(out),
                        device=config.device,
                        num_workers=config.num_workers,
                        **shared,
                    )
                )
                stores.append(TileStore(out))
        return stores[0], stores[1] if len(stores) > 1 else None

    def _cohort(self, store: TileStore, labels: str, training_cohort: Cohort | None = None) -> Cohort:
        config = self.config
        return read_cohort(
            store.path,
            labels,
            kind=training_cohort.task.kind if training_cohort else None if config.task == "auto" else config.task,
            classes=training_cohort.task.classes if training_cohort and training_cohort.task.classes else None,
            label_column=config.label_column,
            slide_column=config.slide_column,
            patient_column=config.patient_column,
            n_tiles=config.n_tiles,
            choice=config.choice,
            missing=config.missing,
        )

    def _answers(self, train: Cohort, test: Cohort | None) -> tuple[MILEnsemble, Answers]:
        """Return the models, and what they say of the test cohort or, without one, of the slides each has not seen."""
        config = self.config
        ensemble = cross_validate_mil(
            train.bags,
            train.labels,
            train.patients,
            train.task,
            config.fit_settings(),
            grid=self._grid(),
            folds=config.folds,
            repeats=config.repeats,
            epoch_as_published=config.epoch_as_published,
        )
        if test is None:
            return ensemble, Answers(train, ensemble.unseen_scores(train.bags))
        logits = ensemble.member_logits(test.bags)
        alone = retrain(train.bags, train.labels, ensemble).predict(test.bags)
        members = np.stack([test.task.scores(each) for each in logits])
        return ensemble, Answers(test, ensemble.averaged(logits, config.average), alone, members)

    def _figures(self, ensemble: MILEnsemble, answers: Answers, train: Cohort) -> dict[str, Any]:
        cohort, task = answers.cohort, answers.cohort.task
        patients, labels, scores = cohort.per_patient(answers.scores)
        interval = bootstrap_interval(
            task.score,
            scores,
            labels,
            seed=self.config.seed,
            kind=self.config.interval_kind,
        )
        chosen = ensemble.settings
        figures = {
            "score": interval.value,
            "interval": interval.ends,
            "score_name": task.metric_name,
            "measured_on": "the test cohort"
            if answers.members is not None
            else "unseen folds, on which epochs and "
            "settings were chosen: optimistic; set nested, or give a test cohort",
            "n": len(patients),
            "slides": len(cohort),
            "train_slides": len(train),
            "train_patients": len(set(train.patients)),
            "dim": train.width,
            "head": chosen.head,
            "task": task.kind,
            "classes": list(task.classes),
            "validation": ensemble.choice["validation"],
            "chosen": {"lr": chosen.lr, "weight_decay": chosen.weight_decay, "epochs": chosen.epochs},
            "models": len(ensemble.heads),
            "left_out": {**train.left_out, **cohort.left_out},
        }
        if answers.members is not None and answers.one_model is not None:
            each = [task.metric(labels, cohort.per_patient(scores)[2]) for scores in answers.members]
            alone = cohort.per_patient(answers.one_model)[2]
            figures["one_model"] = task.metric(labels, alone)
            figures["single_models"] = {"mean": float(np.mean(each)), "sd": float(np.std(each, ddof=1))}
            figures["ensembling"] = _as_dict(compared(cohort, alone, scores, labels, self.config.seed))
        return figures

    def _grid(self) -> dict[str, Sequence[float]]:
        return {"lr": tuple(self.config.lr), "weight_decay": tuple(self.config.weight_decay)}

    def _nested(self, train: Cohort, tested: bool) -> dict[str, Any]:
        """Return the score of nested cross-validation; it is the score where there is no test cohort."""
        config = self.config
        rows = nested_cross_validation(
            train.bags,
            train.labels,
            train.patients,
            train.task,
            config.fit_settings(),
            grid=self._grid(),
            folds=config.folds,
            inner_folds=config.folds,
            repeats=config.repeats,
            epoch_as_published=config.epoch_as_published,
        )
        values = [row["metric"] for row in rows if not np.isnan(row["metric"])]
        mean = mean_interval(values)
        nested = {"mean": mean.value, "sd": float(np.std(values, ddof=1)), "folds": rows}
        if tested:
            return {"nested": nested}
        ends = [max(0.0, mean.low), min(1.0, mean.high)]
        where = "outer folds of nested cross-validation, which had no part in any choice"
        return {"nested": nested, "score": mean.value, "interval": ends, "measured_on": where}

    def _comparison(self, train: Cohort, answers: Answers) -> dict[str, Any]:
        """Return the difference between the encoders, on the same slides."""
        config = self.config
        other_train = self._cohort(TileStore(str(config.compare)), config.train_labels, train)
        other_test = None
        if config.compare_test is not None:
            other_test = self._cohort(TileStore(config.compare_test), str(config.test_labels), train)
        for one, another in ((train, other_train), (answers.cohort, other_test or other_train)):
            if one.names != another.names:
                lacking = sorted(set(one.names) ^ set(another.names))
                raise UsageError(
                    f"the encoders' features are of different slides, {lacking[0]} among them; embed both alike"
                )
        other = self._answers(other_train, other_test)[1]
        _, labels, ours = answers.cohort.per_patient(answers.scores)
        theirs = other.cohort.per_patient(other.scores)[2]
        difference = compared(answers.cohort, theirs, ours, labels, config.seed)
        return {"other": config.compare, "other_score": train.task.metric(labels, theirs), **_as_dict(difference)}

    def _write(
        self, out: Path, ensemble: MILEnsemble, answers: Answers, figures: dict[str, Any], store: TileStore
    ) -> None:
        from patchloom.evaluate.slides.result_page import write_result_page

        make_folder(out)
        write_json(out / "summary.json", {"protocol": "slides", **figures})
        write_predictions(out / "predictions.csv", answers)
        ensemble.save(out / "ensemble")
        write_result_page(out / "report.html", self.config, ensemble, answers, figures, store)


def compared(cohort: Cohort, first: np.ndarray, second: np.ndarray, labels: np.ndarray, seed: int) -> Difference:
    """Return by how much the second scores are better than the first: DeLong's test for two classes, else bootstrap."""
    if cohort.task.kind == "binary":
        return delong(first, second, labels)
    return paired_bootstrap(cohort.task.score, first, second, labels, seed=seed)


def refuse_unlike(train: TileStore, test: TileStore, train_cohort: Cohort, test_cohort: Cohort) -> None:
    """Refuse a test cohort that shares patients with the training cohort, or whose features were made otherwise.

    Raises:
        UsageError: Says which.
    """
    shared = sorted(
        set(train_cohort.patients) & set(test_cohort.patients) or set(train_cohort.names) & set(test_cohort.names)
    )
    if shared:
        raise UsageError(
            f"{len(shared)} patients or slides are in both cohorts, {shared[0]} among them; leave them out of one"
        )
    for name in ("weights", "pool", "image_size"):
        ours, theirs = train.about.get(name), test.about.get(name)
        if ours is not None and theirs is not None and ours != theirs:
            raise UsageError(
                f"features in {test.path} were made with {name} {theirs}, those in {train.path} with {ours}"
            )
    for name in ("tile_size", "mpp"):
        ours, theirs = (store.about.get("tiles", {}).get(name) for store in (train, test))
        if ours is not None and theirs is not None and ours != theirs:
            raise UsageError(f"tiles in {test.path} have {name} {theirs}, those in {train.path} {ours}; cut both alike")
    if train_cohort.width != test_cohort.width:
        raise UsageError(
            f"features in {test.path} are {test_cohort.width} wide, those in {train.path} {train_cohort.width}"
        )


def write_predictions(path: Path, answers: Answers) -> None:
    """Write one row per slide: slide, patient, label and scores."""
    cohort = answers.cohort
    columns = list(cohort.task.classes) if cohort.task.kind == "multiclass" else ["score"]
    rows = []
    for number, name in enumerate(cohort.names):
        label = cohort.task.classes[int(cohort.labels[number])] if cohort.task.classes else cohort.labels[number]
        scores = np.atleast_1d(answers.scores[number]).tolist()
        alone = [float(answers.one_model[number])] if _has_column(answers) else []  # type: ignore[index]
        rows.append([name, cohort.patients[number], label, *scores, *alone])
    one_model = ["one_model"] if _has_column(answers) else []
    write_rows(path, ["slide", "patient", "label", *columns, *one_model], rows)


def _identity(encoder: Any) -> str:
    """Return what tells an encoder's weights: the module's or bundle's own, or the name of a published model."""
    if isinstance(encoder, nn.Module):
        return weights_fingerprint(encoder)
    return bundle_fingerprint(str(encoder)) if Path(str(encoder)).exists() else str(encoder)


def _has_column(answers: Answers) -> bool:
    return answers.one_model is not None and answers.one_model.ndim == 1


def _as_dict(difference: Difference) -> dict[str, Any]:
    return {
        "difference": difference.value,
        "interval": [difference.low, difference.high],
        "p_value": difference.p_value,
    }
