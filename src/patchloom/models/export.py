"""A bundle in the formats others read: ONNX, and timm's own.

>>> import patchloom as pl
>>> pl.export("runs/mine/model", out="mine.onnx", format="onnx")  # doctest: +SKIP
"""

from __future__ import annotations

import sys
from typing import Any, Literal

from patchloom.base.sizes import Size, checked_size
from patchloom.errors import UsageError, unknown_name
from patchloom.io import check_place, write_text

FORMATS = ("onnx", "timm", "hub")


def export(
    bundle: str,
    out: str,
    format: Literal["onnx", "timm", "hub"] = "onnx",
    image_size: Size | None = None,
    opset: int = 18,
    normalize: bool = False,
    overwrite: bool = False,
) -> str:
    """Write a bundle in another format.

    Args:
        bundle: Bundle or run folder.
        out: File (onnx) or folder (timm, hub) to write.
        format: onnx: one file, any batch size, checked against onnxruntime. timm: a clean copy of the bundle. hub: one
            to give away, with a model card (README.md) of what was recorded, and without places on this disk.
        image_size: Side of the images in pixels, or height and width (256,128); default: the model's. Positions are
            resampled where it differs.
        opset: ONNX operator set.
        normalize: Put the normalisation into the ONNX model, which then takes images in [0, 1].
        overwrite: Replace what is there.

    Returns:
        The path written. The ONNX model maps `images` (batch, channels, height, width), normalised, to `features`
        (batch, width), or to `logits` where the bundle has a classifier or classes learnt in tasks; its metadata hold
        `mean` and `std`, names of classes, and the value range of deep images, where the bundle knows them.

    Raises:
        UsageError: There is no such bundle, `out` exists, or the encoder cannot take images of that size.
        MissingExtraError: ONNX packages are not installed.
        ExportMismatchError: onnxruntime disagrees with torch by more than 1e-4.
    """
    from patchloom.encoders import set_image_size
    from patchloom.models.bundle import holds_more, load, load_model, read_lineage, save_bundle
    from patchloom.models.onnx_file import Normalised, export_onnx, input_notes, need_onnx

    if format not in FORMATS:
        raise unknown_name("format", format, FORMATS)
    path = check_place(out)
    if path.exists() and not overwrite:
        raise UsageError(f"{out} exists; choose another place, or set overwrite to replace it")
    if format == "onnx":
        need_onnx()
        if path.is_dir() or not path.suffix:
            raise UsageError(f"{out} is no name of a file; write one such as {out}/model.onnx")
    whole = holds_more(bundle)
    model: Any = load_model(bundle) if whole and format == "onnx" else load(bundle)
    if whole and format != "onnx":
        print(f"{bundle}: its encoder alone goes to {out}; timm has no model for the rest", file=sys.stderr)
    if whole and format == "onnx" and image_size is not None:
        raise UsageError(f"image_size is {image_size}, and {bundle} takes the size it was trained at; leave it out")
    if image_size is not None:
        set_image_size(model, checked_size("image_size", image_size))
    if format == "timm":
        save_bundle(model, path, lineage=read_lineage(bundle), overwrite=overwrite)
        return str(path)
    if format == "hub":
        from patchloom.models.card import model_card, public_lineage, read_summary

        lineage = public_lineage(read_lineage(bundle))
        save_bundle(model, path, lineage=lineage, overwrite=overwrite)
        write_text(path / "README.md", model_card(model, lineage, read_summary(bundle), path.name))
        return str(path)
    notes = input_notes(model, normalized=normalize)
    export_onnx(Normalised(model) if normalize else model, model, path, opset, notes)
    if "value_range" in notes:
        print(
            f"the model was trained on values read by value_range={notes['value_range']}: bring images to [0, 1] "
            f"by it{'' if normalize else ', then normalise them'} (the file's metadata say so too)",
            file=sys.stderr,
        )
    return str(path)
