"""A model card: what a stranger has to know of a model before using it (Mitchell et al. 2019, arXiv 1810.03993).

Written from what the bundle and its run recorded and from nothing else; what nobody recorded is named as missing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from huggingface_hub import ModelCardData

from patchloom.encoders import embed_dim, image_size, in_chans
from patchloom.encoders import kind_of as kind_of_input

FIGURES = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "majority_share": "share of the commonest class",
    "macro_auroc": "AUROC, mean over labels",
    "miou": "mean IoU",
    "dice": "Dice",
    "image_auroc": "AUROC of images",
    "pixel_auroc": "AUROC of pixels",
    "knn_accuracy": "k-NN accuracy",
    "rankme": "effective rank of the features (RankMe)",
}
"""Figures of a run's summary that say what a model is worth, and how they are called."""
ORIGINS = ("data", "test", "train", "probe_data", "encoder", "init_from", "teacher", "out", "codebook", "groups")
SHOWN = ("epochs", "max_steps", "batch_size", "lr", "image_size", "seed")


def model_card(model: Any, lineage: Mapping[str, Any], summary: Mapping[str, Any], name: str) -> str:
    """Return the text of a README.md with the hub's own header.

    Args:
        model: The encoder, or classifier.
        lineage: What made it, as `read_lineage` returns it, with `public_lineage` gone over.
        summary: Figures of the run that made it; empty where there are none.
        name: What the model is called.
    """
    classes = int(getattr(model, "num_classes", 0) or 0)
    task = "image-classification" if classes else "image-feature-extraction"
    header = ModelCardData(library_name="timm", pipeline_tag=task, tags=["patchloom", "vision-transformer", "timm"])
    parts = [
        f"---\n{header.to_yaml()}\n---",
        f"# {name}",
        _what(model, classes),
        f"## How to use it\n\n{_use(model, classes)}",
        f"## How it was made\n\n{_made(lineage)}",
        f"## What was measured\n\n{_measured(summary)}",
        f"## What is not known\n\n{_unknown(lineage, summary)}",
    ]
    return "\n\n".join(parts) + "\n"


def public_lineage(lineage: Mapping[str, Any]) -> dict[str, Any]:
    """Return a lineage in which places on a disk are cut to their last part: they are nobody else's business."""
    public = dict(lineage)
    for key in ("path", "name"):
        if isinstance(public.get(key), str):
            public[key] = _last(public[key])
    for key in ("data", "from", "lineage", "teacher"):
        if isinstance(public.get(key), Mapping):
            public[key] = public_lineage(public[key])
    settings = public.get("settings")
    if isinstance(settings, Mapping):
        public["settings"] = {
            key: _last(value) if key in ORIGINS else _within(value) for key, value in settings.items()
        }
    return public


def read_summary(bundle: str | Path) -> dict[str, Any]:
    """Return the figures of the run a bundle lies in; none where it lies in none."""
    place = Path(bundle)
    for folder in (place, place.parent if place.name == "model" else place):
        try:
            found = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(found, dict):
            return found
    return {}


def steps_of(lineage: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield what made a model, then what made the model it began with, and so on."""
    here: Any = lineage
    while isinstance(here, Mapping) and here.get("made_by"):
        yield here
        before = here.get("from")
        here = before.get("lineage") if isinstance(before, Mapping) else None


def _what(model: Any, classes: int) -> str:
    parameters = sum(parameter.numel() for parameter in model.parameters())
    size = " × ".join(map(str, _sides(model)))
    kind = kind_of_input(model)
    gives = f"scores of {classes} classes" if classes else f"a vector of {embed_dim(model)} numbers"
    return (
        f"A Vision Transformer of {parameters / 1e6:.1f} million parameters that makes {gives} of {_article(kind)} of "
        f"{size} pixels with {in_chans(model)} channels. Made by Patchloom, in timm's layout."
    )


def _use(model: Any, classes: int) -> str:
    known: Mapping[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    mean, std = (", ".join(f"{float(value):.4g}" for value in known.get(key) or ()) for key in ("mean", "std"))
    lines = [
        "```python",
        "import timm",
        "",
        'model = timm.create_model("local-dir:THIS_FOLDER", pretrained=True).eval()  # or hf-hub:USER/NAME',
        f"{'logits' if classes else 'features'} = model(images)",
        "```",
        "",
        f"Images are in [0, 1], then normalised by mean {mean} and standard deviation {std}.",
    ]
    reading = known.get("reading") or {}
    if reading:
        said = ", ".join(f"{key}={value}" for key, value in reading.items())
        lines.append(f"Stored values became [0, 1] in this way: {said}.")
    names = known.get("label_names")
    if names:
        lines.append(f"Classes, in order: {', '.join(map(str, names))}.")
    return "\n".join(lines)


def _made(lineage: Mapping[str, Any]) -> str:
    rows = ["| step | command | images | settings |", "| --- | --- | --- | --- |"]
    steps = list(steps_of(lineage))
    for number, step in enumerate(reversed(steps), start=1):
        data = step.get("data") or {}
        images = f"{data.get('images', '?')} of `{data.get('name', '?')}`" if data else "not recorded"
        settings = step.get("settings") or {}
        shown = ", ".join(f"{key} {settings[key]}" for key in SHOWN if settings.get(key) is not None)
        count = f", {step['steps']} steps" if step.get("steps") is not None else ""
        rows.append(f"| {number} | `patchloom {step['made_by']}` | {images} | {shown}{count} |")
    if not steps:
        return "Not recorded."
    return "\n".join(rows) + "\n\n`patchloom.json` has every setting of every step."


def _measured(summary: Mapping[str, Any]) -> str:
    found = {key: summary[key] for key in FIGURES if isinstance(summary.get(key), (int, float))}
    if not found:
        return "Nothing was measured by the run that made this model."
    rows = ["| figure | value |", "| --- | --- |"]
    for key, value in found.items():
        rows.append(f"| {FIGURES[key]} | {value:.4g} |")
    verdict = f"\n\n{summary['verdict']}" if summary.get("verdict") else ""
    return "\n".join(rows) + verdict


def _unknown(lineage: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    lines = [
        "- Who may use the images it was trained on, and so the model: add `license` and where the images are from.",
        "- How it fares on images of another camera, place, population or time than it was measured on.",
        "- Whether its errors fall on some groups more than on others: nothing here was measured by group.",
    ]
    first = list(steps_of(lineage))[-1:] if lineage else []
    before = first[0].get("from") if first else None
    if isinstance(before, Mapping) and not before.get("lineage"):
        place = before.get("path") or before.get("name") or "other weights"
        lines.append(f"- What the weights it began with ({place}) were trained on.")
    if not summary.get("accuracy") and not summary.get("miou"):
        lines.append("- What it is worth on a task: train a probe on labelled images of yours first.")
    return "\n".join(lines)


def _sides(model: Any) -> tuple[int, ...]:
    sides: Any = image_size(model)
    return (sides, sides) if isinstance(sides, int) else tuple(sides)


def _article(kind: str) -> str:
    return f"an {kind}" if kind[0] in "aeiou" else f"a {kind}"


def _last(value: Any) -> Any:
    """Return the last part of a path; what is no path stays, and what stands behind `word:` is cut as a path is."""
    if not isinstance(value, str) or not ("/" in value or "\\" in value):
        return value
    word, colon, rest = value.partition(":")
    if colon and len(word) > 1 and "/" not in word:
        return f"{word}:{_last(rest)}"
    return PurePosixPath(value).name if "/" in value else PureWindowsPath(value).name


def _within(value: Any) -> Any:
    """Return a value that is no place by name with absolute paths in it cut."""
    looks = isinstance(value, str) and (value.startswith(("/", "~")) or (len(value) > 2 and value[1:3] == ":\\"))
    return _last(value) if looks else value
