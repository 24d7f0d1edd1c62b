"""One vector per image, in a file with the file names.

>>> import patchloom as pl
>>> pl.embed("runs/mine/model", data="my/folder", out="vectors.parquet")  # doctest: +SKIP
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from patchloom.base.ranges import Count, PositiveInt, checked
from patchloom.base.sizes import Size, checked_size
from patchloom.errors import MissingExtraError, UsageError
from patchloom.io import check_place, written_whole

if TYPE_CHECKING:
    import numpy as np

    from patchloom.data.base import Source, StreamSource


@checked
def embed(
    model: str,
    data: str,
    out: str,
    image_size: Size | None = None,
    batch_size: PositiveInt = 128,
    num_workers: Count = 2,
    device: str = "auto",
    pool: Literal["auto", "cls", "avg", "cls+avg"] = "auto",
    precision: Literal["32", "bf16", "16"] = "32",
    overwrite: bool = False,
    include: str | None = None,
    exclude: str | None = None,
    missing: str | None = None,
    value_range: str = "auto",
    no_data: float | None = None,
    use_channels: str | None = None,
    channel_files: str | None = None,
    clip_frames: PositiveInt | None = None,
    clip_stride: PositiveInt | None = None,
    image_field: str | None = None,
    label_field: str | None = None,
    mask_field: str | None = None,
    caption_field: str | None = None,
) -> str:
    """Write the feature vector of every image to a file.

    Args:
        model: Bundle, run folder, or name of a timm model, whose published weights are fetched.
        data: Images: a folder, photos, shards, torchvision:NAME, hf:NAME.
        out: File to write: .parquet (columns file, label, caption, vector) or .npz (arrays files, labels, captions,
            vectors). Labels are class numbers, -1 where unknown; data without labels or captions has no such column.
        image_size: Side images are resized and cropped to, or height and width (256,128); default: the encoder's.
        batch_size: Images at a time.
        num_workers: Processes that read images.
        device: auto, cpu, cuda or cuda:1.
        pool: How tokens become one vector: as the encoder does, class token, mean over patches, or both.
        precision: Number format of the encoder's arithmetic; vectors are float32 in any case.
        overwrite: Replace the file if it is there.
        include: Only files that fit one of these globs, separated by commas (*.jpg,scans/*).
        exclude: Leave out files that fit one of these globs.
        missing: Words that stand for a missing label besides an empty cell, separated by commas (NA,?).
        value_range: What stored values become 0 and 1: auto (as the model was trained, else by a look at the images),
            LOW,HIGH, bits:N or percentiles:LOW,HIGH.
        no_data: Value that means that nothing is known of a pixel.
        use_channels: Numbers of the channels taken of each file, from 0, such as 4,2,0.
        channel_files: What tells apart files that hold one channel each (_c0,_c1,_c2, or dapi/,gfp/).
        clip_frames: Frames of a clip; default: as many as the model takes, else 16.
        clip_stride: Frames of a video from one of a clip to the next; default: the model's, else 4.
        image_field: What holds the images: a column, an ending in shards, an ending of names or a folder.
        label_field: What holds the labels: a column or columns, a key of .json or an ending in shards.
        mask_field: What holds the masks, which are left out.
        caption_field: What holds the captions: a column, a key of .json or an ending in shards, an ending of names.

    Returns:
        The path of the file. Images that could not be read are left out and named on the error stream.

    Raises:
        UsageError: Another kind of file, one that exists, or no such model or data.
        MissingExtraError: Parquet without pyarrow.
    """
    import numpy as np

    from patchloom.data import SourceOptions, open_source
    from patchloom.encoders import in_chans
    from patchloom.features.extract import extract
    from patchloom.models.bundle import open_encoder

    path = check_place(out)
    if path.is_dir():
        raise UsageError(f"{out} is a folder; name a file in it, such as {out}/vectors.parquet")
    if path.suffix not in (".parquet", ".npz"):
        raise UsageError(f"out is {out}; name a file that ends in .parquet or .npz")
    if path.exists() and not overwrite:
        raise UsageError(f"{out} exists; choose another file, or set overwrite to replace it")
    if path.suffix == ".parquet":
        _need_pyarrow()
    encoder = open_encoder(model)
    options = SourceOptions(
        include=include,
        exclude=exclude,
        missing=missing,
        value_range=value_range,
        no_data=no_data,
        use_channels=use_channels,
        channel_files=channel_files,
        clip_frames=clip_frames,
        clip_stride=clip_stride,
        image_field=image_field,
        label_field=label_field,
        mask_field=mask_field,
        caption_field=caption_field,
    )
    source = open_source(data, in_chans=in_chans(encoder), model=encoder, **options.source_options())
    places: list[int] = []
    features = extract(
        encoder,
        source,
        image_size=None if image_size is None else checked_size("image_size", image_size),
        batch_size=batch_size,
        num_workers=num_workers,
        device=device,
        pool=pool,
        precision=precision,
        places=places,
    )
    for key, reason in features.skipped:
        print(f"left out {key}: {reason}", file=sys.stderr)
    vectors, labels = features.vectors.numpy(), features.labels.numpy()
    captions = _captions(source, places)
    with written_whole(path) as temporary:
        if path.suffix == ".npz":
            # Plain text arrays: readable without pickle.
            arrays: dict[str, Any] = {} if captions is None else {"captions": np.array(captions, dtype=np.str_)}
            arrays |= {"files": np.array(features.keys, dtype=np.str_), "labels": labels, "vectors": vectors}
            np.savez(temporary, **arrays)
        else:
            _write_parquet(temporary, features.keys, labels, vectors, captions)
    return str(path)


def _captions(source: Source | StreamSource, places: list[int]) -> list[str] | None:
    """Return the captions of images, empty where one has none or it cannot be read, which is said; None without any."""
    from patchloom.data.base import StreamSource, UnreadableImageError

    if not source.captions:
        return None
    if isinstance(source, StreamSource):
        if not source.seeks:
            print(f"{source.name} is compressed, so captions are not read beside the images", file=sys.stderr)
            return None
        source = source.by_index()
    found, unread = [], []
    for place in places:
        try:
            found.append(source.caption(place))
        except UnreadableImageError as error:
            found.append("")
            unread.append(error)
    if unread:
        more = f" and {len(unread) - 1} more" if len(unread) > 1 else ""
        print(f"no caption for {unread[0].key}{more}: {unread[0].reason}", file=sys.stderr)
    return found


def _need_pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingExtraError("pyarrow", "parquet", "writing .parquet") from error
    return pyarrow


def _write_parquet(
    path: Path, keys: list[str], labels: np.ndarray, vectors: np.ndarray, captions: list[str] | None
) -> None:
    pyarrow = _need_pyarrow()
    flat = pyarrow.array(vectors.reshape(-1), type=pyarrow.float32())
    columns = {"file": pyarrow.array(keys)}
    if labels.ndim == 2:  # several labels per image; NaN where unknown
        values = pyarrow.array(labels.reshape(-1), type=pyarrow.float32())
        columns["labels"] = pyarrow.FixedSizeListArray.from_arrays(values, labels.shape[1])
    elif (labels >= 0).any():
        columns["label"] = pyarrow.array(labels)
    if captions is not None:
        columns["caption"] = pyarrow.array([caption or None for caption in captions], type=pyarrow.string())
    columns["vector"] = pyarrow.FixedSizeListArray.from_arrays(flat, vectors.shape[1])
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
