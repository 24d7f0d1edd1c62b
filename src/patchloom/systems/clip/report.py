"""What a report says of aligned towers: recall, zero-shot accuracy, and what is found for what."""

from __future__ import annotations

import torch

from patchloom.data.base import Source
from patchloom.data.pixels import unit
from patchloom.data.transforms import EvalTransform
from patchloom.report import Section, curves, nearest_neighbours
from patchloom.systems.clip.held_out import HeldOut
from patchloom.systems.clip.zero_shot import RANKS
from patchloom.training.metrics import series

EXAMPLES, FOUND, SIDE = 6, 6, 64


def sections(found: HeldOut, source: Source, rows: list[dict[str, float]]) -> list[Section]:
    """Return the sections of held-out pairs.

    Args:
        found: What the towers make of them.
        source: The pairs.
        rows: Of `metrics.csv`.
    """
    return [
        *_classes(found),
        _recall(found, rows),
        _captions_of_images(found, source),
        _images_of_captions(found, source),
    ]


def _classes(found: HeldOut) -> list[Section]:
    if not found.per_class:
        return []
    figures = found.figures
    text = (
        f"Named by sentences alone, {figures['accuracy']:.1%} of the held-out images get their class, "
        f"{figures['accuracy_top5']:.1%} have it among the first five; mean over classes (balanced accuracy) "
        f"{figures['balanced_accuracy']:.1%}; naming the commonest class every time gives "
        f"{figures['majority_share']:.1%}."
    )
    table: list[dict[str, object]] = [
        {"class": name, "accuracy": f"{share:.1%}"} for name, share in found.per_class.items()
    ]
    return [Section(title="Zero-shot classification", text=text, table=table)]


def _recall(found: HeldOut, rows: list[dict[str, float]]) -> Section:
    names = {"image_to_text": "an image looks for its caption", "text_to_image": "a caption looks for its image"}
    table: list[dict[str, object]] = [
        {"": words, **{f"R@{rank}": f"{found.figures[f'{name}_r{rank}']:.1%}" for rank in RANKS}}
        for name, words in names.items()
    ]
    different = len(found.text_ids.unique())
    text = (
        f"Among {len(found.keys)} held-out pairs with {different} different captions: how often what is right is among "
        f"the first 1, 5 and 10 found. Images with the same caption are all right."
    )
    recalls = {f"{words}, R@5": series(rows, f"{name}_r5") for name, words in names.items()}
    recalls = {name: (steps, values) for name, (steps, values) in recalls.items() if len(steps) > 1}
    figures = [curves(recalls, x_label="step", y_label="share", title="Recall at 5")] if recalls else []
    return Section(title="Retrieval", text=text, table=table, figures=figures)


def _chosen(found: HeldOut) -> list[int]:
    """Return places of a few pairs, evenly spread, of different captions where there are as many."""
    step = max(1, len(found.keys) // (4 * EXAMPLES))
    chosen: dict[int, int] = {}
    for place in range(0, len(found.keys), step):
        chosen.setdefault(int(found.text_ids[place]), place)
    return list(chosen.values())[:EXAMPLES]


def _captions_of_images(found: HeldOut, source: Source) -> Section:
    """Return images in a row, and below what is said of them."""
    places = _chosen(found)
    kinds, first = _distinct(found)
    scores = found.images[places] @ found.texts[first].T
    count = min(3, len(kinds))
    best = scores.topk(count, dim=1)
    table: list[dict[str, object]] = []
    for row, place in enumerate(places):
        right = source.caption(found.indices[place])
        heard = [source.caption(found.indices[first[number]]) for number in best.indices[row].tolist()]
        cells = {
            f"found {number + 1}": f"{caption} ({score:.2f})"
            for number, (caption, score) in enumerate(zip(heard, best.values[row].tolist(), strict=True))
        }
        table.append({"image": found.keys[place], "its caption": right, **cells})
    text = "Held-out images, what is said of them, and the captions nearest to them with their cosine similarity."
    return Section(title="Captions found for images", text=text, table=table)


def _images_of_captions(found: HeldOut, source: Source) -> Section:
    places = _chosen(found)
    best = (found.texts[places] @ found.images.T).topk(min(FOUND, len(found.keys)), dim=1)
    own = torch.stack([_picture(source, found.indices[place]) for place in places])
    shown = torch.stack(
        [torch.stack([_picture(source, found.indices[n]) for n in row]) for row in best.indices.tolist()]
    )
    labels = [str(number + 1) for number in range(len(places))]
    table: list[dict[str, object]] = [
        {"": number, "caption": source.caption(found.indices[place])}
        for number, place in zip(labels, places, strict=True)
    ]
    text = "Left, the image that a caption belongs to; right, the images nearest to the caption by cosine similarity."
    return Section(
        title="Images found for captions",
        text=text,
        figures=[nearest_neighbours(own, shown, best.values, labels)],
        table=table,
    )


def _distinct(found: HeldOut) -> tuple[list[int], list[int]]:
    """Return the different captions, and the first place of each."""
    first: dict[int, int] = {}
    for place, kind in enumerate(found.text_ids.tolist()):
        first.setdefault(kind, place)
    return list(first), list(first.values())


def _picture(source: Source, index: int) -> torch.Tensor:
    image = unit(EvalTransform(SIDE, 1.0)(source.read(index).image)["image"])
    return image[:3] if image.shape[0] >= 3 else image[:1].expand(3, -1, -1)
