"""`patchloom anomaly METHOD`: train on good images, set the threshold, measure on defects, beside the baselines."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from patchloom import registry
from patchloom.data.base import Source
from patchloom.data.defects import DefectSets, DefectSource
from patchloom.errors import UsageError
from patchloom.evaluate.anomaly.anomalib import defect_sets, is_anomalib
from patchloom.evaluate.anomaly.measure import Scored, figures, rows_of, score_images, thresholds_of
from patchloom.evaluate.anomaly.patchcore import PatchFeatures, fit_patchcore
from patchloom.evaluate.anomaly.random_masks import RandomMasks
from patchloom.evaluate.anomaly.report import report_sections
from patchloom.io import write_json, write_rows
from patchloom.report import add_section
from patchloom.systems.ear.config import EARConfig
from patchloom.systems.ear.data import MODULE, asked_of, good_views, open_sets, open_validation, settled
from patchloom.systems.ear.method import EARMethod, say_calibration, split_good
from patchloom.systems.ear.model import EAR, AttentionSaliency
from patchloom.systems.ear.saved import SavedEAR, load_ear
from patchloom.training.run import Run, fit, is_first_process, read_run, resolve

SCORES = "scores.csv"
SCORES_HEADER = ["file", "kind", "label", "score", "normalized", "defect"]
ITSELF = "ear"


def train(method: str, settings: Mapping[str, Any]) -> Run:
    """Train a detector of defects and measure it, see `patchloom.api.anomaly`.

    A run that is complete is measured again, if it has not been.
    """
    command = f"anomaly {method}"
    method_class: type[EARMethod] = registry.method_class("anomaly", method)
    module = settings.get("data")
    if is_anomalib(module):
        settings = {**settings, "data": f"{MODULE}{module.name}"}  # type: ignore[union-attr]
    config = cast(EARConfig, resolve(command, method_class, settings))
    sets, config = _of_module(module, config) if is_anomalib(module) else open_sets(config)
    say_calibration(sets.good, config)
    run = fit(command, method_class, config, source=sets.good, given=settings)
    if not is_first_process() or sets.test is None or "image_auroc" in run.summary:
        return run
    # What was settled for the size of the data holds for what it is compared with, too.
    config = cast(EARConfig, resolve(command, method_class, {"out": config.out, "resume": True}))
    return _measured(run, command, config, sets.good, sets.test)


def _of_module(module: Any, config: EARConfig) -> tuple[DefectSets, EARConfig]:
    """Return the images of a data module of anomalib, and the settings with their shape and value range."""
    for name in ("probe_data", "masks"):
        if (value := getattr(config, name)) is not None:
            raise UsageError(f"{name} is {value}, and a data module of anomalib has its own; leave it out")
    sets = defect_sets(module, **asked_of(config))
    return sets, settled(config, sets)


def _measured(run: Run, command: str, config: EARConfig, good: Source, test: DefectSource) -> Run:
    """Measure a trained model and its baselines on images; write figures, scores and pictures to its run."""
    saved = load_ear(run.path)
    device = _device(config)
    learnt, held_out = split_good(good, config)
    validation = open_validation(config, good)
    detectors: dict[str, nn.Module] = {ITSELF: saved.model}
    for name in config.baseline_names:
        detectors[name] = _baseline(name, command, config, saved, learnt, good, run.path, device)
    scored, found = dict[str, Scored](), dict[str, dict[str, Any]]()
    asked: dict[str, Any] = {"batch_size": config.score_batch_size, "num_workers": config.num_workers, "device": device}
    for name, detector in detectors.items():
        if name == ITSELF:
            limits = float(saved.model.threshold), float(saved.model.pixel_threshold)
        else:
            kept = score_images(
                detector,
                held_out if validation is None else validation,
                saved.image_size,
                what=f"threshold of {name}",
                keep_maps=False,
                **asked,
            )
            limits = thresholds_of(kept, validation is not None)
        scored[name] = score_images(detector, test, saved.image_size, what=f"defects by {name}", **asked)
        found[name] = figures(scored[name], *limits)
        scored[name].forget_maps()
    own = found[ITSELF]
    if "undefined" in own:
        print(f"{test.name}: {own['undefined']}", file=sys.stderr)
    for name, each in found.items():
        print(f"{name}: {said(each)}", file=sys.stderr)
    normalized = _normalized(saved.model, scored[ITSELF].scores)
    write_rows(run.path / SCORES, SCORES_HEADER, rows_of(scored[ITSELF], own["threshold"], normalized))
    if run.report.exists():
        for section in reversed(report_sections(saved, test, scored, found)):
            add_section(run.report, section)
    baselines = {name: each for name, each in found.items() if name != ITSELF}
    skipped = [list(one) for one in scored[ITSELF].skipped]
    more = {"baselines": baselines} if baselines else {}
    summary = {**run.summary, **own, **more, "unreadable_test_images": skipped}
    write_json(run.path / "summary.json", json.loads(json.dumps(summary, default=str)))
    return read_run(run.path)


def said(found: Mapping[str, Any]) -> str:
    """Return the figures of one detector as a line, with intervals."""
    names = {
        "image_auroc": "image AUROC",
        "image_ap": "AP",
        "image_f1": "F1",
        "pixel_auroc": "pixel AUROC",
        "pixel_ap": "pixel AP",
        "pixel_f1": "pixel F1",
        "aupro": "AUPRO",
    }
    parts = []
    for name, word in names.items():
        if name not in found:
            continue
        ends = found["intervals"].get(name)
        value = "undefined" if found[name] is None else f"{found[name]:.3f}"
        between = f" ({ends[0]:.3f} to {ends[1]:.3f})" if ends and None not in ends and found[name] is not None else ""
        parts.append(f"{word} {value}{between}")
    return ", ".join(parts) + f"; {found['milliseconds_per_image']:.3g} ms an image"


def _baseline(
    name: str,
    command: str,
    config: EARConfig,
    saved: SavedEAR,
    learnt: Source,
    good: Source,
    run_dir: Path,
    device: torch.device,
) -> nn.Module:
    if name == "patchcore":
        features = PatchFeatures(cast(AttentionSaliency, saved.model.saliency).encoder).to(device)
        batches = (
            images.to(device)
            for images, _, _ in good_views(learnt, saved.image_size, config.score_batch_size, config.num_workers)
        )
        return fit_patchcore(features, batches, len(learnt), memory_patches=config.memory_patches, seed=config.seed)
    folder = run_dir / "baselines" / name
    apart = dataclasses.replace(
        config,
        out=str(folder),
        masking="random",
        encoder="none",
        saliency="auto",
        init_from=None,
        baselines="",
        report=False,
        resume=True,
        overwrite=False,
    )
    print(f"training {name} for comparison, in {folder}", file=sys.stderr)
    network = load_ear(fit(command, EARMethod, apart, source=good, go_on=None).path).model.unet
    return RandomMasks(network, smoothing=config.smoothing, score=config.score, seed=config.seed)


def _normalized(model: EAR, scores: list[float]) -> list[float]:
    device = model.threshold.device
    return [float(part) for part in model.normalized(torch.tensor(scores, device=device))]


def _device(config: EARConfig) -> torch.device:
    if config.accelerator in ("cpu", "mps"):
        return torch.device(config.accelerator)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
