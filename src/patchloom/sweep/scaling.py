"""How accuracy grows with the size of the model, of the images and of the labelled set.

The method of the two radiology reports on DINOv2 and DINOv3: the same frozen probe over a grid of model sizes,
resolutions and numbers of labels, so that one can read off what more of each is worth. Features are computed once
per model and resolution; label sets are nested (the 10 labels of a class contain its 5).
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from patchloom.base.ranges import Count, PositiveInt, checked
from patchloom.base.sizes import Size, checked_size, size_text
from patchloom.base.source_options import SourceOptions
from patchloom.errors import UsageError, unknown_name
from patchloom.evaluate.config import EvaluationConfig
from patchloom.evaluate.subset_config import Protocol, check_shots
from patchloom.io import write_text
from patchloom.sweep.study import Cell, Outcome, Table, claim_folder, markdown, run_cells, write_csv

if TYPE_CHECKING:
    from patchloom.features.class_scores import ClassScores
    from patchloom.features.extract import Features

PROTOCOLS = ("logistic", "knn")
NEIGHBOURS = 20


@checked
def scaling(
    encoders: list[str],
    train: str,
    test: str,
    out: str,
    image_sizes: list[Size] | None = None,
    shots: list[float] | None = None,
    shots_by: Protocol = "nested",
    patients: str | None = None,
    seeds: PositiveInt = 3,
    protocol: Literal["logistic", "knn"] = "logistic",
    untrained: bool = False,
    batch_size: PositiveInt = 128,
    num_workers: Count = 2,
    device: str = "auto",
    overwrite: bool = False,
    include: str | None = None,
    exclude: str | None = None,
    missing: str | None = None,
    value_range: str = "auto",
    no_data: float | None = None,
    use_channels: str | None = None,
    channel_files: str | None = None,
    image_field: str | None = None,
    label_field: str | None = None,
    mask_field: str | None = None,
) -> str:
    """Measure encoders of several sizes at several resolutions with several numbers of labels.

    Started again, it goes on where it stopped.

    Args:
        encoders: Bundles, runs or timm models, the smaller first.
        train: Labelled images to learn from.
        test: Labelled images to measure on.
        out: Folder of the study: scaling.md, scaling.csv and report.html.
        image_sizes: Sides of the images in pixels, or height and width ([64, [256, 128]]); default: what each encoder
            was made for.
        shots: Labels per class to learn from; default: 1, 5, 10, 50 and all there are.
        shots_by: How labelled images are drawn: nested, or as published: dinov2, dinov3 (shots below 1 are shares),
            radiology (so many in all, evenly spaced, or of each class so many patients).
        patients: CSV file (columns key, group) of the patients of the training images, for radiology.
        seeds: Draws of the labelled images; scores are means over them with 95 % intervals.
        protocol: Probe on the frozen features: logistic regression or k-NN.
        untrained: Give the encoders fresh weights first.
        batch_size: Images at a time.
        num_workers: Processes that read images.
        device: Where the encoders compute: auto, cpu, cuda or cuda:1.
        overwrite: Compute everything anew.
        include: Only files that fit one of these globs, separated by commas (*.jpg,scans/*).
        exclude: Leave out files that fit one of these globs.
        missing: Words that stand for a missing label besides an empty cell, separated by commas (NA,?).
        value_range: What stored values become 0 and 1: auto (as each model was trained, else by a look at the images),
            LOW,HIGH, bits:N or percentiles:LOW,HIGH.
        no_data: Value that means that nothing is known of a pixel.
        use_channels: Numbers of the channels taken of each file, from 0, such as 4,2,0.
        channel_files: What tells apart files that hold one channel each (_c0,_c1,_c2, or dapi/,gfp/).
        image_field: What holds the images: a column, an ending in shards, an ending of names or a folder.
        label_field: What holds the labels: a column or columns, a key of .json or an ending in shards.
        mask_field: What holds the masks, which are left out.

    Returns:
        The table, as Markdown.

    Raises:
        UsageError: No encoder, an unknown protocol, or impossible numbers.
    """
    if not encoders:
        raise UsageError("scaling needs at least one encoder")
    if protocol not in PROTOCOLS:
        raise unknown_name("protocol", protocol, PROTOCOLS)
    shot_counts = [1, 5, 10, 50] if shots is None else [int(s) if s == int(s) else s for s in sorted(set(shots))]
    for shot in shot_counts:
        check_shots(shot, shots_by, patients is not None)
    shared: dict[str, Any] = {"train": train, "test": test, "untrained": untrained, "batch_size": batch_size}
    shared |= SourceOptions(
        include=include,
        exclude=exclude,
        missing=missing,
        value_range=value_range,
        no_data=no_data,
        use_channels=use_channels,
        channel_files=channel_files,
        image_field=image_field,
        label_field=label_field,
        mask_field=mask_field,
    ).source_options()
    probe: dict[str, Any] = {"protocol": protocol, "shots": shot_counts, "seeds": seeds, "all": shots is None}
    if shots_by != "nested":  # studies made before there was a choice go on
        probe |= {"shots_by": shots_by, "patients": patients}
    given = None if image_sizes is None else [checked_size("image_sizes", size) for size in image_sizes]
    sizes: list[Size | None] = [None] if given is None else [*given]
    image_sizes = None if given is None else [_plain(size) for size in given]
    cells = [
        Cell(
            {"encoder": encoder, "image size": "own" if size is None else size_text(size)},
            {**shared, **probe, "encoder": encoder, "image_size": None if size is None else _plain(size)},
        )
        for encoder in encoders
        for size in sizes
    ]
    asked = {"encoders": encoders, "image_sizes": image_sizes, "seeds": seeds, "protocol": protocol}
    drawn = {"shots": shots, "shots_by": shots_by, "patients": patients}
    folder = claim_folder(out, {**asked, **drawn, **shared}, overwrite)

    def work(cell: Cell) -> dict[str, Any]:
        settings = {name: cell.settings[name] for name in ("encoder", "image_size", *shared)}
        return _measure(EvaluationConfig(**settings, num_workers=num_workers, device=device), probe)

    outcomes = run_cells(cells, work, folder)
    rows = [row for outcome in outcomes for row in _rows(outcome)]
    write_csv(folder / "scaling.csv", rows)
    text = markdown([_readable(row) for row in rows])
    write_text(folder / "scaling.md", text + "\n")
    _write_report(folder, rows, outcomes)
    return Table(text, rows)


def _plain(size: Size) -> Any:
    """Return a size as files of settings have it."""
    return size if isinstance(size, int) else list(size)


def _side(text: str) -> float:
    """Return the side of a square of as many pixels as images of a size have: 64, or 256x128."""
    sides = [int(side) for side in text.split("x")]
    return float(sides[0]) if len(sides) == 1 else round(math.sqrt(sides[0] * sides[1]), 1)


def _measure(config: EvaluationConfig, probe: dict[str, Any]) -> dict[str, Any]:
    from patchloom.data.groups import read_groups
    from patchloom.evaluate.subset import few_shot_subset, shot_neighbours, taken
    from patchloom.evaluate.target import labelled_features
    from patchloom.statistics.intervals import mean_interval

    start = time.perf_counter()
    train, test, class_names = labelled_features(config)
    by, patients = probe.get("shots_by", "nested"), probe.get("patients")
    grouped = None if patients is None else read_groups(patients, train.keys)
    points = []
    for shots in [*probe["shots"], *([None] if probe["all"] else [])]:
        draws = range(probe["seeds"]) if shots is not None and by != "radiology" else range(1)  # that one draws nothing
        scores, used = [], 0
        most = max(shot_neighbours([NEIGHBOURS], shots, by))
        for seed in draws:
            learnt = train
            if shots is not None:
                chosen = few_shot_subset(train.labels, shots, protocol=by, seed=seed, patients=grouped)
                learnt = taken(train, chosen)
            scores.append(_scores(learnt, test, len(class_names), probe["protocol"], most))
            used = len(learnt.labels)
        mean = mean_interval([score.accuracy for score in scores])
        points.append(
            {
                "shots": shots,
                "images": used,
                "accuracy": mean.value,
                "low": mean.ends[0],
                "high": mean.ends[1],
                "balanced_accuracy": sum(score.balanced_accuracy for score in scores) / len(scores),
                "majority_share": scores[-1].majority_share,
            }
        )
    return {"points": points, "dim": int(test.vectors.shape[1]), "seconds": round(time.perf_counter() - start, 1)}


def _scores(train: Features, test: Features, classes: int, protocol: str, most: int) -> ClassScores:
    from patchloom.evaluate.logistic import fit_logistic
    from patchloom.features.class_scores import class_scores
    from patchloom.features.knn import knn_predict

    x, y = train.vectors, train.labels
    if protocol == "knn":
        predicted = knn_predict(x, y, test.vectors, k=min(most, len(y)), temperature=0.07, num_classes=classes)
    else:
        predicted = fit_logistic(x, y, classes, c=1.0).predict(test.vectors)
    return class_scores(predicted, test.labels)


def _rows(outcome: Outcome) -> list[dict[str, Any]]:
    labels: dict[str, Any] = dict(outcome.cell.labels)
    if outcome.error is not None:
        return [{**labels, "failed": outcome.error}]
    points = [
        {**point, "shots": "all" if point["shots"] is None else point["shots"]} for point in outcome.figures["points"]
    ]
    return [{**labels, **point} for point in points]


def _readable(row: dict[str, Any]) -> dict[str, Any]:
    if "failed" in row:
        return {"encoder": row["encoder"], "image size": row["image size"], "accuracy": f"failed: {row['failed']}"}
    text = f"{row['accuracy']:.1%}"
    if row["low"] is not None:
        text += f" ± {(row['high'] - row['low']) / 2:.1%}"
    return {
        "encoder": row["encoder"],
        "image size": row["image size"],
        "labels per class": row["shots"],
        "images": row["images"],
        "accuracy": text,
        **{
            name.replace("_", " "): f"{row[name]:.1%}"
            for name in ("balanced_accuracy", "majority_share")
            if name in row
        },
    }


def _write_report(folder: Path, rows: list[dict[str, Any]], outcomes: list[Outcome]) -> None:
    from patchloom.report import Section, curves, write_report

    scored = [row for row in rows if "failed" not in row]
    sections = []
    if scored:
        sections.append(Section(title="Accuracy by labels", figures=[_chart(scored, "images", "labelled images")]))
        if len({row["image size"] for row in scored}) > 1:
            by_size = {
                f"{encoder}, {shots} per class": sorted(
                    (_side(row["image size"]), row["accuracy"] * 100)
                    for row in scored
                    if (row["encoder"], row["shots"]) == (encoder, shots)
                )
                for encoder, shots in dict.fromkeys((row["encoder"], row["shots"]) for row in scored)
            }
            chart = curves(
                {name: tuple(zip(*points, strict=True)) for name, points in by_size.items()},  # type: ignore[misc]
                x_label="side of the images, pixels",
                y_label="accuracy, %",
                title="Accuracy by resolution",
            )
            sections.append(Section(title="Accuracy by resolution", figures=[chart]))
    sections.append(Section(title="All figures", table=[_readable(row) for row in rows]))
    write_report(
        folder / "report.html",
        title="Scaling with model size, resolution and labels",
        facts={
            "encoders": len({row["encoder"] for row in rows}),
            "resolutions": len({row["image size"] for row in rows}),
            "failed": sum(outcome.error is not None for outcome in outcomes),
        },
        sections=sections,
        command=f"patchloom evaluate scaling --config {folder}/study.yaml --out {folder}",
    )


def _chart(rows: list[dict[str, Any]], x: str, label: str) -> Any:
    from patchloom.report import curves

    names = dict.fromkeys((row["encoder"], row["image size"]) for row in rows)
    series, bands = {}, {}
    for encoder, size in names:
        mine = [row for row in rows if (row["encoder"], row["image size"]) == (encoder, size)]
        name = Path(encoder).name if size == "own" else f"{Path(encoder).name} at {size}"
        name = encoder if name in series else name
        series[name] = ([row[x] for row in mine], [row["accuracy"] * 100 for row in mine])
        low, high = ([100 * row["accuracy" if row[end] is None else end] for row in mine] for end in ("low", "high"))
        bands[name] = (low, high)
    return curves(series, bands=bands, x_label=label, y_label="accuracy, %", title="Accuracy by labels", log_x=True)
