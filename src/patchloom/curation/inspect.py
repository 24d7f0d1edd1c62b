"""What a pile of images holds, in figures, a table and a page of pictures."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch.nn import functional as F

from patchloom.curation.compare import Compared, compared
from patchloom.curation.config import InspectConfig
from patchloom.curation.pairs import groups_of, leaks
from patchloom.data.base import Source, UnreadableImageError
from patchloom.data.pixels import unit
from patchloom.errors import UsageError
from patchloom.features.extract import torch_device
from patchloom.io import check_place, make_folder, write_json, write_rows
from patchloom.report.page import Figure, Section, write_report
from patchloom.report.tiles import enlarged, labelled, pixels_of, png, stack, strip

SHOWN, IN_ROW, TILE = 12, 6, 150
"""Groups of a picture, images of a group and their side in pixels."""
FEW = 5
"""Images of a class below which it is named as small."""
FILES = ("report.html", "images.csv", "duplicates.csv", "summary.json")


def run_inspect(config: InspectConfig) -> dict[str, Any]:
    """Look at every image: does it open, what size is it, is there a copy of it, is one of them in the test?

    Returns:
        A `verdict` of one sentence; counts of `images`, `broken`, `plain` ones, `copies` (images that could go) in
        `groups`, `labelled_apart` (groups whose images have different labels), `leaked` (images with a copy in `test`);
        `sizes`, `values` and `classes`; how copies were told; and `out` with its files.

    Raises:
        UsageError: No such data, no image opens, or files of an earlier look are there.
    """
    folder = None if config.out is None else _place(config.out, config.overwrite)
    images = compared(config)
    device = torch_device(config.device)
    groups = groups_of(images.vectors, images.threshold, device)
    figures = _figures(images, groups)
    test, leaked = None, list[tuple[int, int, float]]()
    if config.test is not None:
        test = images.of(config.test, config)
        leaked = leaks(images.vectors, test.vectors, images.threshold, device)
        figures["leaked"] = len(leaked)
        figures["test_images_with_a_copy"] = len({other for _, other, _ in leaked})
    figures = {"verdict": verdict(figures), **figures}
    if folder is not None:
        make_folder(folder)
        _write_tables(folder, images, groups, test, leaked)
        _write_page(folder / FILES[0], config, images, groups, test, leaked, figures)
        figures["out"] = str(folder)
        write_json(folder / FILES[3], figures)
    return figures


def verdict(figures: dict[str, Any]) -> str:
    """Return in one sentence what to do about what was found."""
    found = []
    if figures.get("leaked"):
        found.append(
            f"{figures['leaked']} images have a copy in the test (data dedup --against takes them out of training)"
        )
    if figures["copies"]:
        copies = f"{figures['copies']} of {figures['images']} images"
        found.append(f"{copies} are copies of others (data dedup lists the rest)")
    if figures["labelled_apart"]:
        found.append(f"copies in {figures['labelled_apart']} groups have different labels, one of which is wrong")
    if figures["broken"]:
        found.append(_counted(figures["broken"], "file does not open", "files do not open"))
    if figures["plain"]:
        found.append(_counted(figures["plain"], "image is of one colour", "images are of one colour") + " all over")
    if figures.get("small_classes"):
        found.append(f"{figures['small_classes']} classes have fewer than {FEW} images")
    return ("; ".join(found) if found else "Nothing stands in the way of training") + "."


def _counted(count: int, one: str, several: str) -> str:
    return f"{count} {one if count == 1 else several}"


def _figures(images: Compared, groups: Sequence[np.ndarray]) -> dict[str, Any]:
    look, source = images.look, images.source
    height, width = look.facts[:, 0], look.facts[:, 1]
    sizes = Counter(zip(height.astype(int).tolist(), width.astype(int).tolist(), strict=True))
    apart = [group for group in groups if _labels_differ(look.labels[group])]
    figures: dict[str, Any] = {
        "images": len(look),
        "broken": len(look.skipped),
        "plain": int(look.plain.sum()),
        "copies": sum(len(group) - 1 for group in groups),
        "groups": len(groups),
        "labelled_apart": len(apart),
        "sizes": [
            {"height x width": f"{h} x {w}", "images": count, "share": count / len(look)}
            for (h, w), count in sizes.most_common(8)
        ],
        "different_sizes": len(sizes),
        "values": {
            name: float(value)
            for name, value in zip(
                ("darkest", "brightest", "mean", "spread"),
                (look.facts[:, 2].min(), look.facts[:, 3].max(), look.facts[:, 4].mean(), look.facts[:, 5].mean()),
                strict=True,
            )
        },
        "channels": source.in_chans,
        "value_range": str(source.values),
        **images.facts,
    }
    if source.class_names is not None and look.labels.ndim == 1:
        counts = np.bincount(look.labels[look.labels >= 0], minlength=len(source.class_names))
        figures["classes"] = dict(zip(source.class_names, counts.tolist(), strict=True))
        figures["without_label"] = int((look.labels < 0).sum())
        figures["small_classes"] = int((counts < FEW).sum())
    elif source.class_names is not None:
        figures["classes"] = {
            name: int(np.nansum(look.labels[:, place])) for place, name in enumerate(source.class_names)
        }
    return figures


def _labels_differ(labels: np.ndarray) -> bool:
    if labels.ndim == 2:
        low, high = np.nan_to_num(labels, nan=2).min(0), np.nan_to_num(labels, nan=-1).max(0)
        return bool(((high >= 0) & (low < high)).any())
    return len(np.unique(labels[labels >= 0])) > 1


def _place(out: str, overwrite: bool) -> Path:
    folder = check_place(out)
    there = [name for name in FILES if (folder / name).exists()]
    if there and not overwrite:
        raise UsageError(f"{folder} holds {there[0]} of an earlier look; choose another out, or set overwrite")
    return folder


def _write_tables(
    folder: Path,
    images: Compared,
    groups: Sequence[np.ndarray],
    test: Compared | None,
    leaked: Sequence[tuple[int, int, float]],
) -> None:
    look = images.look
    number_of = {int(member): number for number, group in enumerate(groups) for member in group}
    copy_in_test = {} if test is None else {image: test.look.keys[other] for image, other, _ in leaked}
    rows: list[list[Any]] = [
        [
            key,
            *(int(side) for side in facts[:2]),
            *(f"{value:.4f}" for value in facts[2:6]),
            number_of.get(number, ""),
            copy_in_test.get(number, ""),
            "",
        ]
        for number, (key, facts) in enumerate(zip(look.keys, look.facts.tolist(), strict=True))
    ]
    rows += [[key, *[""] * 8, reason] for key, reason in look.skipped]
    header = ["file", "height", "width", "darkest", "brightest", "mean", "spread", "group", "copy_in_test", "broken"]
    write_rows(folder / FILES[1], header, rows)
    pairs = [
        [number, look.keys[int(member)], _label(images, int(member)), f"{_similarity(images, group[0], member):.4f}"]
        for number, group in enumerate(groups)
        for member in group
    ]
    write_rows(folder / FILES[2], ["group", "file", "label", "similarity_to_first"], pairs)


def _similarity(images: Compared, first: int, second: int) -> float:
    return float(F.cosine_similarity(images.vectors[int(first)], images.vectors[int(second)], dim=0))


def _label(images: Compared, number: int) -> str:
    names, labels = images.source.class_names, images.look.labels
    if names is None:
        return ""
    if labels.ndim == 2:
        return "|".join(names[place] for place in np.flatnonzero(np.nan_to_num(labels[number]) > 0.5))
    return names[int(labels[number])] if labels[number] >= 0 else ""


def _write_page(
    path: Path,
    config: InspectConfig,
    images: Compared,
    groups: Sequence[np.ndarray],
    test: Compared | None,
    leaked: Sequence[tuple[int, int, float]],
    figures: dict[str, Any],
) -> None:
    look = images.look
    facts = {name: figures[name] for name in ("images", "broken", "plain", "copies", "groups")}
    sections = []
    if test is not None:
        facts["leaked"] = len(leaked)
        pairs = [one for image, other, _ in leaked for one in ((images, image), (test, other))]
        rows = [pairs[at : at + IN_ROW] for at in range(0, min(len(pairs), IN_ROW * SHOWN), IN_ROW)]
        text = f"{len(leaked)} images of {images.source.name} have a copy in {test.source.name}."
        picture = _picture(rows, "Pairs: an image, and beside it its copy in the test")
        sections.append(Section("Copies in the test", text, picture))
    apart = [group for group in groups if _labels_differ(look.labels[group])]
    if apart:
        rows = [[(images, int(member)) for member in group[:IN_ROW]] for group in apart[:SHOWN]]
        text = "The same picture under several labels: at most one of them is right."
        sections.append(Section("Copies with different labels", text, _picture(rows, "A row for each group")))
    if groups:
        rows = [[(images, int(member)) for member in group[:IN_ROW]] for group in groups[:SHOWN]]
        text = (
            f"{figures['copies']} images are copies of others, in {len(groups)} groups; compared by the "
            f"{figures['compared_by']}, from a cosine similarity of {images.threshold:.3f} on. duplicates.csv has all."
        )
        sections.append(Section("Near-duplicates", text, _picture(rows, "A row for each of the largest groups")))
    order = np.argsort(look.facts[:, 4], kind="stable")
    rows = [[(images, int(n)) for n in order[:IN_ROW]], [(images, int(n)) for n in order[::-1][:IN_ROW]]]
    sections.append(Section("Darkest and brightest", "", _picture(rows, "First row: darkest; second: brightest")))
    sections.append(Section("Sizes", f"{figures['different_sizes']} different ones.", table=figures["sizes"]))
    if classes := figures.get("classes"):
        common = sorted(classes.items(), key=lambda one: -one[1])
        rows_of = [{"class": name, "images": count, "share": count / len(look)} for name, count in common]
        sections.append(Section("Classes", f"{len(common)} classes.", table=rows_of[:40]))
    if look.skipped:
        broken = [{"file": key, "why": reason} for key, reason in look.skipped[:40]]
        sections.append(Section("Files that do not open", f"{len(look.skipped)} files.", table=broken))
    command = ["patchloom", "data", "inspect", "--data", config.data]
    command += ["--test", config.test] if config.test is not None else []
    command += ["--encoder", config.encoder] if isinstance(config.encoder, str) else []
    write_report(
        path,
        title=f"What {images.source.name} holds",
        subtitle=f"{len(look)} images read as {images.source.in_chans} channels, values {images.source.values}",
        facts=facts,
        sections=sections,
        command=shlex.join([*command, "--out", str(config.out)]),
        verdict=figures["verdict"],
    )


def _picture(rows: Sequence[Sequence[tuple[Compared, int]]], caption: str) -> list[Figure]:
    """Return rows of images under their names; none where they can only be read from front to back."""
    strips = []
    for row in rows:
        tiles = []
        for images, number in row:
            if not isinstance(images.source, Source):
                return []
            try:
                value = images.source.read(int(images.look.places[number])).image
            except UnreadableImageError:  # gone since
                continue
            label = _label(images, number)
            name = images.look.keys[number].rpartition("/")[2]
            tiles.append(labelled(f"{label}: {name}" if label else name, enlarged(pixels_of(unit(value)), TILE)))
        if tiles:
            strips.append(strip(tiles))
    return [Figure(png(stack(strips)), caption, caption)] if strips else []
