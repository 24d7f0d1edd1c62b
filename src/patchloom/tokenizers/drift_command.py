"""`patchloom tokenize drift`; what it needs is loaded when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from patchloom.base.ranges import Count, PositiveInt, checked
from patchloom.base.sizes import Size, compact
from patchloom.base.source_options import SourceOptions
from patchloom.errors import UsageError
from patchloom.io import check_place, write_json

if TYPE_CHECKING:
    from torch import Tensor

    from patchloom.data.base import Source, StreamSource
    from patchloom.tokenizers.drift import Drift
    from patchloom.tokenizers.tokenizer import Tokenizer

SHOWN = 12
"""Codes that gained and lost most which are drawn."""


@checked
def measure_drift(
    first: str,
    second: str,
    codebook: str | None = None,
    out: str | None = None,
    k: PositiveInt = 512,
    patch_size: PositiveInt = 16,
    image_size: Size = 224,
    images: PositiveInt = 2000,
    permutations: PositiveInt = 1999,
    num_workers: Count = 2,
    seed: Count = 0,
    overwrite: bool = False,
    include: str | None = None,
    exclude: str | None = None,
    in_chans: PositiveInt = 3,
    value_range: str = "auto",
    use_channels: str | None = None,
) -> dict[str, Any]:
    """Tell whether two piles of images come from one camera, scanner or stain: by the codes of a codebook.

    Args:
        first: Images as they were, such as those a model was trained on: a folder, a table, shards.
        second: Images as they are now.
        codebook: Codebook file, its folder, or a run of pretrain ccvit or tokenize, which `first` had no part in
            (images lie nearer to a codebook fitted on them); default: one is fitted on half of `first`, and the other
            half is compared.
        out: Folder to write to: drift.json and report.html; default: none.
        k: Centroids of the codebook that is fitted.
        patch_size: Side of a patch of the codebook that is fitted, in pixels.
        image_size: Side the images are resized and cropped to, pixels, or height and width (256,128).
        images: Images drawn of each pile, at most.
        permutations: Random deals by which chance is judged; the smallest p-value is 1 / (permutations + 1).
        num_workers: Processes that read images.
        seed: Of the draws.
        overwrite: Replace the files of an earlier comparison in `out`.
        include: Only files that fit one of these globs, separated by commas.
        exclude: Leave out files that fit one of these globs.
        in_chans: Channels the images are read as.
        value_range: What stored values become 0 and 1; both piles are read as the first is.
        use_channels: Numbers of the channels taken of each file, from 0.

    Returns:
        A `verdict` of one sentence; `divergence` of the codes' shares (bits), what it is `by_chance`, and `p_codes`;
        `error_ratio` (distance of patches to their codes, second over first) and `p_error`; the images of each pile.

    Raises:
        UsageError: No such data or codebook, fewer than two images, or files in `out`.
    """
    from patchloom.data import open_alike
    from patchloom.data.kinds import require_kind
    from patchloom.tokenizers.centroid import CentroidTokenizer
    from patchloom.tokenizers.drift import compare, verdict
    from patchloom.tokenizers.tokenizer import open_tokenizer

    folder = None if out is None else check_place(out)
    if folder is not None and (folder / "drift.json").exists() and not overwrite:
        raise UsageError(f"{folder} holds drift.json; choose another out, or set overwrite to replace it")
    options = SourceOptions(include=include, exclude=exclude, value_range=value_range, use_channels=use_channels)
    tokenizer: Tokenizer | None = None if codebook is None else open_tokenizer(codebook)
    how = {} if tokenizer is None else dict(tokenizer.facts.get("reading") or {})
    channels = in_chans if tokenizer is None else tokenizer.in_chans
    piles = open_alike([first, second], by_index=True, in_chans=channels, **{**how, **options.source_options()})
    for pile in piles:
        require_kind(pile, ("image",), "tokenize drift")
    if tokenizer is None:
        # Images lie nearer to a codebook they had a part in: those it is fitted on are not compared.
        kept, fitted_on = _halves(piles[0], images, seed)
        tokenizer = CentroidTokenizer.fit(
            fitted_on, k, patch_size=patch_size, image_size=image_size, images=images, seed=seed
        )
        piles[0] = kept
    size = compact(image_size)
    looked = [_codes(pile, tokenizer, size, images, num_workers, seed) for pile in piles]
    drift = compare(looked[0][0], looked[1][0], looked[0][1], looked[1][1], permutations=permutations, seed=seed)
    figures: dict[str, Any] = {
        "verdict": verdict(drift),
        "divergence": drift.divergence,
        "by_chance": drift.by_chance,
        "p_codes": drift.p_codes,
        "error_ratio": drift.error_ratio,
        "p_error": drift.p_error,
        "images": [len(shares) for shares, _ in looked],
        "codes": tokenizer.num_codes,
        "codebook": tokenizer.fingerprint(),
    }
    if folder is not None:
        _write_page(folder, tokenizer, drift, figures, (first, second))
        write_json(folder / "drift.json", figures)
        figures["out"] = str(folder)
    return figures


def _halves(source: Source | StreamSource, images: int, seed: int) -> tuple[Source, Source]:
    """Return two random parts of a source without an image in common, of so many images at most."""
    import torch

    from patchloom.data import SubsetSource
    from patchloom.data.base import Source

    if not isinstance(source, Source):
        raise UsageError(
            f"{source.name} can only be read from front to back, so no part of it can be set aside to fit a "
            f"codebook on; give a --codebook"
        )
    order = torch.randperm(len(source), generator=torch.Generator().manual_seed(seed)).numpy()
    half = min(images, len(order) // 2)
    if half < 2:
        raise UsageError(
            f"{source.name} holds {len(source)} images, too few to fit a codebook on half; give a --codebook"
        )
    return SubsetSource(source, order[:half]), SubsetSource(source, order[half : 2 * half])


def _codes(
    source: Source | StreamSource, tokenizer: Tokenizer, size: Any, images: int, num_workers: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Return the share of each code (n, K) and the mean squared error (n,) of a draw of images."""
    import torch

    from patchloom.base.progress import track
    from patchloom.data import EvalTransform, SubsetSource, make_loader, sample_indices
    from patchloom.data.base import Source
    from patchloom.data.pixels import unit

    if isinstance(source, Source) and len(source) > images:
        source = SubsetSource(source, sample_indices(source, images, seed=seed))
    shares: list[Tensor] = []
    errors: list[float] = []
    count = 0
    loader = make_loader(source, EvalTransform(size), 32, seed=seed, shuffle=False, num_workers=num_workers)
    for batch in track(loader, source.name, unit="batch"):
        if not batch["key"]:
            continue
        pixels = unit(batch["image"])
        ids = tokenizer.encode(pixels)
        for image, grid in zip(pixels.split(1), ids.split(1), strict=True):
            counted = torch.bincount(grid.flatten(), minlength=tokenizer.num_codes).float()
            shares.append(counted / counted.sum())
            errors.append(tokenizer.squared_error(image, grid) / image.numel())
        count += len(ids)
        if count >= images:
            break
    if not shares:
        raise UsageError(f"{source.name} holds no readable image")
    return torch.stack(shares), torch.tensor(errors, dtype=torch.float64)


def _write_page(
    folder: Path, tokenizer: Tokenizer, drift: Drift, figures: dict[str, Any], names: tuple[str, str]
) -> None:
    import shlex

    from patchloom.report.page import Section, write_report

    change = drift.shares[1] - drift.shares[0]
    order = change.argsort(descending=True)
    rows = [
        {
            "code": int(code),
            f"share in {names[0]}": float(drift.shares[0, code]),
            f"share in {names[1]}": float(drift.shares[1, code]),
            "change": float(change[code]),
        }
        for code in [*order[:SHOWN].tolist(), *order[-SHOWN:].tolist()]
    ]
    pictures = _patches(tokenizer, order)
    write_report(
        folder / "report.html",
        title="Have the images changed?",
        subtitle=f"{names[0]} and {names[1]}",
        facts={name: figures[name] for name in ("divergence", "by_chance", "p_codes", "error_ratio", "p_error")},
        sections=[
            Section("Codes that gained and lost most", "The share of all patches that each code has.", pictures, rows)
        ],
        command=shlex.join(["patchloom", "tokenize", "drift", *names, "--out", str(folder)]),
        verdict=figures["verdict"],
    )


def _patches(tokenizer: Tokenizer, order: Tensor) -> list[Any]:
    """Return the centroids that gained and lost most as pictures; none of a tokenizer whose codes are no patches."""
    from patchloom.report.page import Figure
    from patchloom.report.tiles import enlarged, labelled, pixels_of, png, stack, strip
    from patchloom.tokenizers.centroid import CentroidTokenizer

    if not isinstance(tokenizer, CentroidTokenizer):
        return []

    def row(codes: Tensor) -> Any:
        patches = [(int(code), tokenizer.decode(code.view(1, 1, 1))[0]) for code in codes]
        return strip([labelled(str(code), enlarged(pixels_of(patch), 64)) for code, patch in patches])

    caption = "First row: codes that gained most; second row: that lost most"
    return [Figure(png(stack([row(order[:SHOWN]), row(order.flip(0)[:SHOWN])])), caption, caption)]
