"""The report of a training run: the pages every method shares, around the method's own."""

from __future__ import annotations

import dataclasses
import math
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from patchloom.data.base import Source, StreamSource, UnreadableImageError
from patchloom.data.kinds import KINDS
from patchloom.data.pixels import alike, unit
from patchloom.data.reading import parse_channels
from patchloom.data.sample import Sample, transformed
from patchloom.encoders import attends, class_attention, feature_map, grid_size, has_tokens, normalize, pooled
from patchloom.features.extract import side_of
from patchloom.report import Figure, Section, attention_maps, curves, nearest_neighbours, pca_features, write_report
from patchloom.report.pictures import middle_images, sample_figure
from patchloom.report.tiles import shown_channels
from patchloom.training.metrics import read_metrics, series

if TYPE_CHECKING:
    from patchloom.training.callbacks import Probe
    from patchloom.training.method import Method

PICTURES, NEIGHBOUR_POOL, SAMPLES = 8, 400, 6
# Figures shown as per cent; an accuracy never stands without the two it is read beside.
PERCENT = {
    f"{prefix}{name}": f"{words}{readable}"
    for prefix, words in (("knn_", "k-NN "), ("", ""))
    for name, readable in (
        ("accuracy", "accuracy"),
        ("balanced_accuracy", "balanced accuracy"),
        ("majority_share", "commonest class"),
    )
}


def write_run_report(run_dir: Path, command: str, method: Method, probe: Probe, summary: dict[str, Any]) -> Path:
    """Write `report.html` of a run.

    Args:
        run_dir: Run folder; its `metrics.csv` gives the curves.
        command: Words that name the method on the command line.
        method: The trained method.
        probe: Its held-out images are the ones shown.
        summary: The final figures.
    """
    with shown_channels(parse_channels(method.config.shown_channels)):
        return _write_run_report(run_dir, command, method, probe, summary)


def _write_run_report(run_dir: Path, command: str, method: Method, probe: Probe, summary: dict[str, Any]) -> Path:
    rows = read_metrics(run_dir / "metrics.csv")
    sections: list[Section | None] = [*training_sections(rows)]
    if probe.data.queries is not None:
        encoder = method.bundle_model().eval()
        images = held_out_samples(probe.data.queries, side_of(encoder, None), NEIGHBOUR_POOL)
        # Every few images of the probe set, so that classes that follow one another are all seen.
        shown = images[:: max(1, len(images) // PICTURES)][:PICTURES]
        with torch.no_grad():
            sections += [*method.report_sections(shown), *feature_sections(encoder, images, shown, method)]
        if "rankme" in summary:
            sections.append(health_section(rows, summary))
    else:
        sections += method.report_sections(torch.empty(0)) or [samples_section(method.source)]
    for part in method.attached:
        sections += part.report_sections(method)
    sections.append(settings_section(method))
    return write_report(
        run_dir / "report.html",
        title=f"{command}: {method.config.data}",
        subtitle=f"{method.config.encoder}, {summary['steps']} steps, {summary['duration']}{_channels_shown(method)}",
        facts=headline(summary),
        sections=[section for section in sections if section is not None],
        command=command_line(command, method),
        verdict=" ".join([*summary.get("advice", []), str(summary.get("verdict", ""))]).strip(),
    )


def _channels_shown(method: Method) -> str:
    """Return which channels the pictures show, where there are more than can be."""
    count = method.config.in_chans
    if count <= 3:
        return ""
    shown = parse_channels(method.config.shown_channels) or (0, 1, 2)
    return f"; pictures show channels {', '.join(map(str, shown[:3]))} of {count} (from 0)"


def held_out_samples(source: Source, size: Any, count: int) -> Tensor:
    """Return up to `count` readable samples, evenly spread over the source, of a size: (n, C, *sides).

    Of samples with more axes than an image has, fewer are read: as many frames or slices in all.
    """
    if not isinstance(size, int):
        count = max(PICTURES, count // math.prod(size[:-2]))
    view, generator = source.kind.eval_view("crop", size), torch.Generator()
    values = [
        transformed(view, sample, generator)[source.kind.name]
        for sample in readable(source, max(1, len(source) // count), count)
    ]
    return torch.stack(alike(values))


def readable(source: Source, step: int, count: int) -> Iterator[Sample]:
    """Yield up to `count` samples of every so many, without those that cannot be read."""
    for index in range(0, len(source), step):
        if not count:
            return
        try:
            yield source.read(index)
        except UnreadableImageError:
            continue
        count -= 1


def samples_section(source: Source | StreamSource) -> Section | None:
    """Return a few samples as their kind is drawn; nothing for a stream."""
    if not isinstance(source, Source):
        return None
    shown = list(readable(source, max(1, len(source) // SAMPLES), SAMPLES))
    text = f"A few of the {source.kind.plural} that were trained on."
    return Section(title="Samples", text=text, figures=[sample_figure(source.kind, shown)]) if shown else None


def headline(summary: dict[str, Any]) -> dict[str, Any]:
    """Return the figures shown at the top."""
    names = {
        KINDS[summary["data"].get("kind", "image")].plural: summary["data"]["images"],
        "loss": summary.get("loss"),
        **{readable: summary.get(name) for name, readable in PERCENT.items()},
        "RankMe": summary.get("rankme"),
        "parameters": f"{summary['parameters'] / 1e6:.1f} M",
        "images/s": summary["images_per_second"],
        "time": summary["duration"],
        "unreadable": summary["unreadable_images"],
    }
    return {name: f"{v:.1%}" if name in PERCENT.values() else v for name, v in names.items() if v is not None}


def training_sections(rows: list[dict[str, float]]) -> list[Section]:
    """Return loss and k-NN curves."""
    figures = []
    losses = [name for row in rows for name in row if name.endswith("loss")]
    plotted = {name.replace("_", " "): series(rows, name) for name in dict.fromkeys(losses)}
    if plotted:
        figures.append(curves(plotted, x_label="step", y_label="loss", title="Training losses"))
    # Of the training task: whatever is no figure of images measured on.
    tasks = [name for row in rows for name in row if name.endswith("accuracy") and name not in PERCENT]
    plotted = {name.replace("_", " "): series(rows, name) for name in dict.fromkeys(tasks)}
    if plotted:
        figures.append(curves(plotted, x_label="step", y_label="share", title="Accuracy on the training task"))
    for prefix, title in (("knn_", "k-NN accuracy on held-out images"), ("", "Accuracy on the images measured on")):
        if (chart := accuracy_chart(rows, prefix, title)) is not None:
            figures.append(chart)
    steps, values = series(rows, "lr")
    if len(steps) > 1:
        figures.append(curves({"lr": (steps, values)}, x_label="step", y_label="rate", title="Learning rate"))
    return [Section(title="Training", figures=figures)] if figures else []


def accuracy_chart(rows: list[dict[str, float]], prefix: str, title: str) -> Figure | None:
    """Return accuracy and balanced accuracy over the steps, with the commonest class's share as a dashed line."""
    plotted = {name: series(rows, prefix + name.replace(" ", "_")) for name in ("accuracy", "balanced accuracy")}
    plotted = {name: (steps, values) for name, (steps, values) in plotted.items() if len(steps) > 1}
    if not plotted:
        return None
    shares = series(rows, f"{prefix}majority_share")[1]
    references = {"commonest class every time": shares[-1]} if shares else None
    return curves(plotted, x_label="step", y_label="share", title=title, references=references)


def feature_sections(encoder: torch.nn.Module, images: Tensor, shown: Tensor, method: Method) -> list[Section]:
    """Return attention maps (of a ViT), PCA-coloured features in their places and nearest neighbours.

    Of clips and volumes, the middle is shown.
    """
    pixels = method.pixels(shown).to(method.device)
    inputs = normalize(pixels, encoder)
    sections = []
    middle = f" What is seen is the middle of each {method.source.kind.name}." if images.ndim > 4 else ""
    what = "patch features" if has_tokens(encoder) else "last feature map"
    if has_tokens(encoder) and attends(encoder):
        attention = class_attention(encoder, inputs).float().cpu()
        maps = attention.unflatten(2, grid_size(encoder, tuple(images.shape[2:])))
        pictures, maps = middle_images(pixels.cpu(), maps)
        sections.append(
            Section(
                title="Attention",
                text="Where the class token looks in the last block: the mean over heads, then each head." + middle,
                figures=[attention_maps(pictures, maps.flatten(2), (maps.shape[-2], maps.shape[-1]))],
            )
        )
    pictures, features = middle_images(pixels.cpu(), feature_map(encoder, inputs).float().cpu())
    places = features.flatten(2).transpose(1, 2)
    sections.append(
        Section(
            title=what.capitalize(),
            text=f"The first three principal components of the {what} as red, green and blue; "
            f"places of one colour are alike to the encoder.{middle}",
            figures=[pca_features(pictures, places, (features.shape[-2], features.shape[-1]))],
        )
    )
    if len(images) >= 8:
        sections.append(neighbour_section(encoder, images, method))
    return sections


def neighbour_section(encoder: torch.nn.Module, images: Tensor, method: Method) -> Section:
    """Return, for a few held-out images, the ones nearest in feature space."""
    vectors = torch.cat(
        [
            pooled(encoder, normalize(method.pixels(chunk.to(method.device)), encoder)).float().cpu()
            for chunk in images.split(64)
        ]
    )
    vectors = F.normalize(vectors, dim=1)
    queries = torch.arange(0, len(images), max(1, len(images) // 6))[:6]
    similarity = vectors[queries] @ vectors.T
    similarity[torch.arange(len(queries)), queries] = -1.0  # an image is not its own neighbour
    values, neighbours = similarity.topk(min(6, len(images) - 1), dim=1)
    images, _ = middle_images(images, images)
    noun = method.source.kind.name
    return Section(
        title="Nearest neighbours",
        text=f"Left, a held-out {noun}; right, the nearest of {len(images) - 1} others by cosine similarity.",
        figures=[nearest_neighbours(unit(images[queries]), unit(images[neighbours]), values)],
    )


def health_section(rows: list[dict[str, float]], summary: dict[str, Any]) -> Section:
    """Return whether the features use their space."""
    figures = []
    for name, title in (("rankme", "RankMe: how many directions the features use"), ("mean_cosine", "Mean cosine")):
        steps, values = series(rows, name)
        if len(steps) > 1:
            figures.append(curves({name: (steps, values)}, x_label="step", y_label=name, title=title))
    text = (
        f"{summary.get('verdict', '')} RankMe {summary['rankme']:.1f} of at most {summary['width']}; mean cosine "
        f"between images {summary['mean_cosine']:.3f} (near 1 means that all images look the same to the encoder)."
    )
    return Section(title="Feature health", text=text, figures=figures)


def settings_section(method: Method) -> Section:
    """Return the settings of the run."""
    table: list[dict[str, object]] = [
        {"setting": name, "value": str(value)} for name, value in dataclasses.asdict(method.config).items()
    ]
    return Section(title="Settings", table=table)


def command_line(command: str, method: Method) -> str:
    """Return the command that repeats the run: what differs from the defaults."""
    config = method.config
    words = ["patchloom", *command.split()]
    for setting in dataclasses.fields(config):
        value = getattr(config, setting.name)
        if setting.name in ("resume", "overwrite") or value == setting.default:
            continue
        shown = f"[{','.join(str(v) for v in value)}]" if isinstance(value, tuple) else str(value)
        words += [f"--{setting.name}", shlex.quote(shown)]
    return " ".join(words)
