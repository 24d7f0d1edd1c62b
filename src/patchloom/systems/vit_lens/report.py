"""What a report says of an aligned sense: classes by sentences, recall, and what is found for what."""

from __future__ import annotations

from patchloom.data.base import Source
from patchloom.report import Section, curves
from patchloom.report.pictures import sample_figure
from patchloom.systems.clip.held_out import HeldOut
from patchloom.systems.clip.zero_shot import RANKS
from patchloom.training.metrics import series

ASKED, FOUND = 4, 3


def sections(found: HeldOut, source: Source, rows: list[dict[str, float]]) -> list[Section]:
    """Return the sections of held-out samples.

    Args:
        found: What the towers make of them.
        source: The samples.
        rows: Of `metrics.csv`.
    """
    return [*_classes(found, source), _recall(found, source, rows), _for_captions(found, source)]


def _classes(found: HeldOut, source: Source) -> list[Section]:
    if not found.per_class:
        return []
    figures = found.figures
    text = (
        f"Named by sentences alone, {figures['accuracy']:.1%} of the held-out {source.kind.plural} get their class, "
        f"{figures['accuracy_top5']:.1%} have it among the first five; mean over classes (balanced accuracy) "
        f"{figures['balanced_accuracy']:.1%}; naming the commonest class every time gives "
        f"{figures['majority_share']:.1%}."
    )
    table: list[dict[str, object]] = [{"class": n, "accuracy": f"{share:.1%}"} for n, share in found.per_class.items()]
    return [Section(title="Zero-shot classification", text=text, table=table)]


def _recall(found: HeldOut, source: Source, rows: list[dict[str, float]]) -> Section:
    kind = source.kind.plural
    names = {
        "sense_to_text": f"{kind} look for their caption",
        "text_to_sense": f"captions look for their {kind}",
        "sense_to_image": f"{kind} look for their pictures",
        "image_to_sense": f"pictures look for their {kind}",
    }
    there = {name: words for name, words in names.items() if f"{name}_r1" in found.figures}
    table: list[dict[str, object]] = [
        {"": words, **{f"R@{rank}": f"{found.figures[f'{name}_r{rank}']:.1%}" for rank in RANKS}}
        for name, words in there.items()
    ]
    text = (
        f"Among {len(found.keys)} held-out samples with {len(found.text_ids.unique())} different captions: how often "
        f"what is right is among the first 1, 5 and 10 found."
    )
    lines = {words: series(rows, f"{name}_r5") for name, words in there.items()}
    lines = {name: (steps, values) for name, (steps, values) in lines.items() if len(steps) > 1}
    figures = [curves(lines, x_label="step", y_label="share", title="Recall at 5")] if lines else []
    return Section(title="Retrieval", text=text, table=table, figures=figures)


def _for_captions(found: HeldOut, source: Source) -> Section:
    """Return captions, and the samples nearest to each."""
    first: dict[int, int] = {}
    for place, text in enumerate(found.text_ids.tolist()):
        first.setdefault(text, place)
    places = list(first.values())[:: max(1, len(first) // ASKED)][:ASKED]
    best = (found.texts[places] @ found.images.T).topk(min(FOUND, len(found.keys)), dim=1)
    figures = []
    for place, row in zip(places, best.indices.tolist(), strict=True):
        samples = [source.read(found.indices[number]) for number in row]
        figures.append(sample_figure(source.kind, samples, caption=source.caption(found.indices[place])))
    text = f"For a few captions, the {source.kind.plural} nearest to each by cosine similarity."
    return Section(title="Found for captions", text=text, figures=figures)
