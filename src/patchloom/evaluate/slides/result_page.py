"""The report page of a slide-level evaluation: scores, curves, and where the models look."""

from __future__ import annotations

import shlex
import warnings
from collections.abc import Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from patchloom.data.base import UnreadableImageError
from patchloom.errors import MissingExtraError, UsageError
from patchloom.evaluate.slides.figures import heat_map, tile_strip
from patchloom.evaluate.slides.store import TileStore
from patchloom.evaluate.slides.validate import MILEnsemble
from patchloom.evaluate.slides.wsi import Slide
from patchloom.report import Figure, Section, bars, curves, write_report

if TYPE_CHECKING:
    from patchloom.evaluate.slides.protocol import Answers, SlidesConfig

TOP_TILES = 8
SLIDES_SHOWN = 3


def write_result_page(
    path: Path,
    config: SlidesConfig,
    ensemble: MILEnsemble,
    answers: Answers,
    figures: dict[str, Any],
    store: TileStore,
) -> Path:
    """Write the page and return its path."""
    low, high = figures["interval"]
    name = figures["score_name"]
    facts: dict[str, object] = {
        name: f"{figures['score']:.3f}",
        "95 % interval": f"{low:.3f} – {high:.3f}",
        "patients": figures["n"],
        "training patients": figures["train_patients"],
        "models": figures["models"],
        "head": figures["head"],
    }
    sections = [
        Section("Score", _words(figures), [_score_bars(figures)], table=_differences(figures)),
        Section(
            "Choice",
            "Mean over the folds of the metric on patients a model has not seen, after each epoch, for each point of "
            f"the grid. Chosen: {_chosen(figures)}.",
            [_choice_curves(ensemble, name)],
        ),
        *heat_map_sections(ensemble, answers, store),
        Section("Predictions", table=_prediction_rows(answers)),
    ]
    if figures["left_out"]:
        rows: list[dict[str, object]] = [
            {"reason": reason, "slides": ", ".join(names)} for reason, names in figures["left_out"].items()
        ]
        sections.append(Section("Left out", table=rows))
    return write_report(
        path,
        title="Slide-level evaluation",
        subtitle=f"{config.train} → {config.test or 'unseen folds'}, {figures['measured_on']}",
        facts=facts,
        sections=sections,
        command=_command(config),
    )


def heat_map_sections(ensemble: MILEnsemble, answers: Answers, store: TileStore) -> list[Section]:
    """Return where the models look on the slides with the highest scores and on the one with the lowest.

    Empty where the head gives tiles no score, or the features come without thumbnails.
    """
    cohort, order = answers.cohort, _by_score(answers)
    shown = [*order[: SLIDES_SHOWN - 1], order[-1]] if len(order) >= SLIDES_SHOWN else order
    figures: list[Figure] = []
    for number in shown:
        name, about = cohort.names[number], store.slide(cohort.names[number])
        thumbnail = store.path / name / "thumbnail.png"
        if not thumbnail.is_file() or not cohort.places:
            continue
        try:
            scores = mean_tile_scores(ensemble, cohort.bags[number])
        except UsageError:
            return []
        label = cohort.task.classes[int(cohort.labels[number])] if cohort.task.classes else cohort.labels[number]
        caption = f"{name}, label {label}, score {_headline(answers, number):.2f}. Yellow: the tiles that count most."
        side = about["tile_size"] * about["tile_mpp"]
        figures.append(heat_map(thumbnail, about["thumbnail_mpp"], cohort.places[number], scores, side, caption))
        strip = _top_tiles(store, name, about, cohort.places[number], scores)
        if strip is not None:
            figures.append(strip)
    if not figures:
        return []
    text = "The slides with the highest scores and the one with the lowest: how much each tile counts, and the tiles "
    return [Section("Attention maps", text + "that count most. Colours are ranks within a slide.", figures)]


@torch.inference_mode()
def mean_tile_scores(ensemble: MILEnsemble, bag: torch.Tensor) -> np.ndarray:
    """Return the mean over the models of what each tile of a bag counts, (n,).

    Raises:
        UsageError: The head gives tiles no score.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scores = [head.tile_scores(bag[None].float().to(ensemble.settings.device))[0] for head in ensemble.heads]
    return torch.stack(scores).mean(0).double().cpu().numpy()


def _top_tiles(
    store: TileStore, name: str, about: dict[str, Any], places: np.ndarray, scores: np.ndarray
) -> Figure | None:
    """Return the tiles that count most, read from the slide; None where it is not there any more."""
    best = np.argsort(-scores, kind="stable")[:TOP_TILES]
    try:
        with Slide(about["file"], slide_mpp=about["mpp"], name=name) as slide:
            level = store.bag(name).level
            chosen = places[best].tolist()
            tiles = [slide.tile(level, column, row, about["tile_size"]) for column, row in chosen]
    except (UnreadableImageError, MissingExtraError):
        return None
    labels = [f"{scores[number]:.2g}" for number in best]
    return tile_strip(tiles, labels, f"{name}: the tiles that count most, and how much.")


def _by_score(answers: Answers) -> list[int]:
    order: list[int] = np.argsort([-_headline(answers, n) for n in range(len(answers.cohort))], kind="stable").tolist()
    return order


def _headline(answers: Answers, number: int) -> float:
    """Return the probability of the positive or likeliest class, or the risk."""
    return float(np.max(answers.scores[number]))


def _words(figures: dict[str, Any]) -> str:
    low, high = figures["interval"]
    text = (
        f"{figures['score_name']} {figures['score']:.3f} (95 % interval {low:.3f} to {high:.3f}) for {figures['n']} "
        f"patients on {figures['measured_on']}."
    )
    if "single_models" in figures:
        single = figures["single_models"]
        text += (
            f" Single models of the ensemble: {single['mean']:.3f} ± {single['sd']:.3f}; one model trained anew on all "
            f"training slides: {figures['one_model']:.3f}."
        )
    return text


def _score_bars(figures: dict[str, Any]) -> Figure:
    values, ends = {"ensemble": figures["score"]}, {"ensemble": tuple(figures["interval"])}
    if "single_models" in figures:
        values |= {
            "one retrained model": figures["one_model"],
            "mean of single models": figures["single_models"]["mean"],
        }
    if "comparison" in figures:
        values["other encoder"] = figures["comparison"]["other_score"]
    return bars(values, intervals=ends, y_label=figures["score_name"], title="Score")


def _choice_curves(ensemble: MILEnsemble, name: str) -> Figure:
    series = {}
    for point in ensemble.choice["grid"]:
        label = ", ".join(f"{key} {value:g}" for key, value in point.items() if key != "curve")
        series[label.replace("weight_decay", "decay")] = (range(1, len(point["curve"]) + 1), point["curve"])
    return curves(series, x_label="epoch", y_label=name, title="Validation")


def _chosen(figures: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in figures["chosen"].items())


def _differences(figures: dict[str, Any]) -> list[dict[str, object]] | None:
    rows: list[dict[str, object]] = []
    for key, words in (
        ("ensembling", "ensemble less one retrained model"),
        ("comparison", "this encoder less the other"),
    ):
        if key in figures:
            difference = figures[key]
            low, high = difference["interval"]
            rows.append(
                {
                    "difference": words,
                    "value": f"{difference['difference']:+.3f}",
                    "95 % interval": f"{low:+.3f} – {high:+.3f}",
                    "p": f"{difference['p_value']:.3g}",
                }
            )
    return rows or None


def _prediction_rows(answers: Answers) -> Sequence[dict[str, object]]:
    cohort = answers.cohort
    return [
        {
            "slide": cohort.names[number],
            "patient": cohort.patients[number],
            "label": cohort.task.classes[int(cohort.labels[number])] if cohort.task.classes else cohort.labels[number],
            "score": f"{_headline(answers, number):.3f}",
        }
        for number in _by_score(answers)
    ]


def _command(config: SlidesConfig) -> str:
    words = ["patchloom evaluate slides"]
    for setting in fields(config):
        value = getattr(config, setting.name)
        default = setting.default_factory() if setting.default_factory is not MISSING else setting.default
        if value == default:
            continue
        if isinstance(value, dict):
            words += [f"--{setting.name}.{key} {shlex.quote(str(item))}" for key, item in value.items()]
        else:
            shown = f"[{','.join(map(str, value))}]" if isinstance(value, tuple) else str(value)
            words.append(f"--{setting.name} {shlex.quote(shown)}")
    return " ".join(words)
