"""`patchloom tokenize fit` and `patchloom tokenize show`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from patchloom.base.ranges import Count, PositiveInt, checked
from patchloom.base.sizes import Size, compact, pair
from patchloom.base.source_options import SourceOptions
from patchloom.errors import UsageError
from patchloom.io import check_place, write_bytes, write_json

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from patchloom.base.progress import Meter
    from patchloom.tokenizers.centroid import CentroidTokenizer
    from patchloom.tokenizers.tokenizer import Tokenizer

# Endings by which `show_codebook` tells a picture to write from a folder.
PICTURES = (".png", ".jpg", ".jpeg", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".svg", ".pdf")


@checked
def fit_codebook(
    data: str,
    out: str,
    k: PositiveInt | None = None,
    patch_size: PositiveInt = 16,
    image_size: Size = 224,
    images: PositiveInt = 50_000,
    per_class: PositiveInt | None = None,
    iters: PositiveInt = 20,
    seed: Count = 1,
    init: Literal["random", "kmeans++"] = "random",
    max_points: PositiveInt | None = None,
    backend: Literal["torch", "faiss"] = "torch",
    device: str = "auto",
    memory_mb: PositiveInt = 512,
    overwrite: bool = False,
    include: str | None = None,
    exclude: str | None = None,
    in_chans: PositiveInt = 3,
    value_range: str = "auto",
    no_data: float | None = None,
    use_channels: str | None = None,
    channel_files: str | None = None,
    image_field: str | None = None,
    label_field: str | None = None,
    mask_field: str | None = None,
) -> dict[str, Any]:
    """Build a centroid codebook from images: k-means over their patches.

    The folder `out` gets `codebook.safetensors`, `summary.json` and `codebook.png`, the centroids as pictures.

    Args:
        data: Images: a folder, shards, or a source such as photos, digits, torchvision:CIFAR10.
        out: Folder to write to; made if missing.
        k: Number of centroids; default: 8192 as in the paper, or the largest power of two below it that leaves
            every centroid 39 patches when there are few images.
        patch_size: Side of a patch in pixels; the encoder's must be the same.
        image_size: Images are resized (shorter side to image_size / 0.875) and centre-cropped to this side in pixels,
            or to height and width (256,128).
        images: Number of images drawn at random, at most (the paper: 50000).
        per_class: Number of images drawn from each class instead, for labelled data (the paper: 50).
        iters: Iterations of k-means (the paper: 20).
        seed: Of the draw of images and of k-means.
        init: Start of k-means: random patches, or kmeans++, slower and often a little better.
        max_points: Number of patches to use at most, spread evenly over the images; default: all.
        backend: torch, or faiss where it is installed (all patches in memory as float32).
        device: Where to cluster: auto (a GPU where there is one), cpu, cuda, cuda:1, ….
        memory_mb: Mebibytes of patches to hold in memory; more of them go to a temporary file.
        overwrite: Replace the files of an earlier codebook in `out`.
        include: Only files that fit one of these globs, separated by commas (*.jpg,scans/*).
        exclude: Leave out files that fit one of these globs.
        in_chans: Channels of the images: 3 (grey ones are repeated), 1, or as many as the files have.
        value_range: What stored values become 0 and 1: auto (by a look at the images), LOW,HIGH, bits:N or
            percentiles:LOW,HIGH.
        no_data: Value that means that nothing is known of a pixel.
        use_channels: Numbers of the channels taken of each file, from 0, such as 4,2,0.
        channel_files: What tells apart files that hold one channel each (_c0,_c1,_c2, or dapi/,gfp/).
        image_field: What holds the images: a column, an ending in shards, an ending of names or a folder.
        label_field: What holds the labels: a column or columns, a key of .json or an ending in shards.
        mask_field: What holds the masks, which are left out.

    Returns:
        What `summary.json` holds, and where the codebook lies.

    Raises:
        UsageError: `out` holds files and `overwrite` is not set; no readable image; k larger than the number of
            different patches; an image size that is no multiple of the patch size.
    """
    from patchloom.tokenizers.centroid import CentroidTokenizer
    from patchloom.tokenizers.codebook_file import CODEBOOK_NAME

    folder = check_place(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())) and not overwrite:
        raise UsageError(f"{folder} is not an empty folder; give another --out or --overwrite")
    line = ProgressLine()
    from patchloom.data import open_source

    tokenizer = CentroidTokenizer.fit(
        open_source(
            data,
            in_chans=len(named.split(",")) if in_chans == 3 and (named := use_channels or channel_files) else in_chans,
            **SourceOptions(
                include=include,
                exclude=exclude,
                value_range=value_range,
                no_data=no_data,
                use_channels=use_channels,
                channel_files=channel_files,
                image_field=image_field,
                label_field=label_field,
                mask_field=mask_field,
            ).source_options(),
        ),
        k,
        patch_size=patch_size,
        image_size=image_size,
        images=images,
        per_class=per_class,
        iters=iters,
        seed=seed,
        max_points=max_points,
        init=init,
        backend=backend,
        device=_device(device),
        memory_mb=memory_mb,
        progress=line,
    )
    line.close()
    tokenizer.save(folder / CODEBOOK_NAME, overwrite=overwrite)
    summary = tokenizer.facts | {
        "duplicates": tokenizer.num_duplicates(),
        "fingerprint": tokenizer.fingerprint(),
        "codebook": str(folder / CODEBOOK_NAME),
    }
    write_json(folder / "summary.json", summary)
    write_bytes(folder / "codebook.png", _mosaic(tokenizer, "hue"))
    return summary


@checked
def show_codebook(
    codebook: str,
    out: str | None = None,
    data: str | None = None,
    sort: Literal["hue", "frequency"] = "hue",
    images: PositiveInt = 8,
    image_size: Size | None = None,
    seed: Count = 0,
    overwrite: bool = False,
    include: str | None = None,
    exclude: str | None = None,
    value_range: str = "auto",
    use_channels: str | None = None,
    shown_channels: str | None = None,
) -> dict[str, Any]:
    """Draw a codebook, and what images look like through it.

    Args:
        codebook: Codebook file (.safetensors, .npy, .faiss) or a folder made by `tokenize fit`; or a run of `tokenize
            train`, of which images are drawn beside their reconstructions (its codes are no pictures by themselves).
        out: Picture to write, a name that ends in .png (`NAME-reconstructions.png` beside it with `data`); or a folder
            for `codebook-SORT.png` and `reconstructions.png`; default: the codebook's folder.
        data: Images to draw beside what their nearest centroids make of them; default: none.
        sort: Order of the centroids in the mosaic: hue, or frequency (how many patches each had when fitted, or has
            in `data` where the file does not say).
        images: Number of images drawn from `data`.
        image_size: Side in pixels those images are resized and cropped to, or height and width (256,128); default: 224,
            of a learned tokenizer the size it was trained at.
        seed: Of the draw of images.
        overwrite: Replace pictures of the same name.
        include: Only files of `data` that fit one of these globs, separated by commas.
        exclude: Leave out files of `data` that fit one of these globs.
        value_range: What stored values become 0 and 1; auto: as those the codebook was fitted on.
        use_channels: Numbers of the channels taken of each file, from 0; default: as the codebook was fitted.
        shown_channels: Channels shown as red, green and blue, or one as grey, such as 4,2,0; default: the first three.

    Returns:
        The files written and, with `data`, the codebook's figures on those images: usage and perplexity of the codes,
        PSNR in dB, dead and duplicate codes.

    Raises:
        UsageError: No codebook or no image there; a picture exists; frequencies asked for and not known.
    """
    import torch

    from patchloom.data.reading import parse_channels
    from patchloom.report.tiles import shown_channels as showing
    from patchloom.tokenizers.centroid import CentroidTokenizer
    from patchloom.tokenizers.tokenizer import open_tokenizer

    tokenizer = open_tokenizer(codebook)
    centroids = tokenizer if isinstance(tokenizer, CentroidTokenizer) else None
    if centroids is None and (data is None or not tokenizer.decodes):
        remedy = "give --data to see images through it" if tokenizer.decodes else "it makes no images of tokens"
        raise UsageError(f"the codes of {codebook} are learned, and no pictures by themselves; {remedy}")
    place = Path(codebook)
    folder = Path(out) if out is not None else (place if place.is_dir() else place.parent)
    if folder.suffix.lower() in PICTURES and not folder.is_dir():
        if folder.suffix.lower() != ".png":
            raise UsageError(f"out is {out}; pictures are written as .png")
        pictures = {"mosaic": folder, "reconstructions": folder.with_name(f"{folder.stem}-reconstructions.png")}
    else:
        pictures = {"mosaic": folder / f"codebook-{sort}.png", "reconstructions": folder / "reconstructions.png"}
    if data is None:
        del pictures["reconstructions"]
    if centroids is None:
        del pictures["mosaic"]
    for path in pictures.values():
        check_place(path)
        if path.exists() and not overwrite:
            raise UsageError(f"{path} exists; give another --out or --overwrite")
    figures: dict[str, Any] = {}
    originals = None
    if data is not None:
        options = SourceOptions(include=include, exclude=exclude, value_range=value_range, use_channels=use_channels)
        how = _fitted(tokenizer) | options.source_options()
        size = image_size or (224 if centroids is not None else tokenizer.facts.get("image_size") or 224)
        originals = _draw_images(data, images, compact(size), tokenizer, seed, how)
        figures = tokenizer.report(originals)
        if centroids is not None and centroids.counts is None:
            centroids.counts = torch.bincount(centroids.encode(originals).flatten(), minlength=centroids.num_codes)
    if sort == "frequency" and centroids is not None and centroids.counts is None:
        raise UsageError(f"{codebook} does not say how often its centroids occur; give --data to count them on")
    with showing(parse_channels(shown_channels)):
        drawings = {} if centroids is None else {"mosaic": _mosaic(centroids, sort)}
        if originals is not None:
            drawings["reconstructions"] = _beside(tokenizer, originals)
    for name, path in pictures.items():
        write_bytes(path, drawings[name])
    return {name: str(path) for name, path in pictures.items()} | figures


class ProgressLine:
    """Progress of one stage after another on stderr."""

    def __init__(self) -> None:
        self._meter: Meter | None = None

    def __call__(self, stage: str, done: int, total: int, remark: str) -> None:
        """Say that `done` of `total` (0: unknown) steps of a stage are over."""
        from patchloom.base.progress import Meter

        if self._meter is None or stage != self._meter.what:
            self.close()
            # The first call of a stage comes after its first step, so the time left is a little short at first.
            self._meter = Meter(stage, total or None, unit=None, first=done, stays=True)
        self._meter.reach(done, lambda: remark)

    def close(self) -> None:
        """End the line."""
        if self._meter is not None:
            self._meter.close()


def _mosaic(tokenizer: CentroidTokenizer, sort: str) -> bytes:
    from patchloom.report.figures import codebook_mosaic

    figure = codebook_mosaic(
        tokenizer.centroids.cpu(), tokenizer.patch_size, tokenizer.in_chans, counts=tokenizer.counts, sort=sort
    )
    png: bytes = figure.png
    return png


def _beside(tokenizer: Tokenizer, originals: Tensor) -> bytes:
    from patchloom.data.pixels import unit
    from patchloom.report.figures import image_grid

    reconstructions = tokenizer.decode(tokenizer.encode(originals)).clamp(0, 1)
    name = "its nearest centroids" if tokenizer.called == "codebook" else "its reconstruction"
    rows = {"image": unit(originals), name: reconstructions}
    png: bytes = image_grid(rows).png
    return png


def _draw_images(
    data: str, count: int, image_size: Size, tokenizer: Tokenizer, seed: int, options: dict[str, Any]
) -> Tensor:
    """Return (n, C, *image_size) uint8 images drawn from a source, n <= count."""
    import numpy as np
    import torch

    from patchloom.data import open_source
    from patchloom.data.base import StreamSource, Unreadable, UnreadableImageError
    from patchloom.data.kinds import require_kind
    from patchloom.data.pixels import alike
    from patchloom.data.transforms import EvalTransform
    from patchloom.encoders.patches import patch_grid

    patch_grid(pair(image_size), tokenizer.patch_size)
    source = open_source(data, in_chans=tokenizer.in_chans, **options)
    require_kind(source, ("image",), "tokenize show")
    transform = EvalTransform(image_size)
    drawn: list[Tensor] = []
    if isinstance(source, StreamSource):
        for sample in source.samples(epoch=0, seed=seed, count=count):
            if not isinstance(sample, Unreadable):
                drawn.append(transform(sample.image)["image"])
    else:
        for index in np.random.default_rng(seed).permutation(len(source)):
            if len(drawn) == count:
                break
            try:
                drawn.append(transform(source.read(int(index)).image)["image"])
            except UnreadableImageError:
                continue
    if not drawn:
        raise UsageError(f"no readable image in {data!r}")
    return torch.stack(alike(drawn))


def _fitted(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the options by which the images were read that the codebook was fitted on."""
    return dict(tokenizer.facts.get("reading") or {})


def _device(name: str) -> torch.device:
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"no device {name!r} here; use auto, cpu or a GPU such as cuda") from error
    return device
