"""Commands of `patchloom segment` besides training; what they need is loaded when they run."""

from __future__ import annotations

from typing import Any

from patchloom.base.sizes import Size


def predict(
    run: str, images: str, out: str, *, batch_size: int = 8, device: str = "auto", include: str | None = None
) -> dict[str, Any]:
    """Write the masks a trained decoder makes of images.

    Args:
        run: Run of `patchloom segment`, or its model.
        images: Folder of images.
        out: Folder to write to; empty or absent. The mask of a/b.jpg is a/b.png, indexed: its indices are classes, its
            palette their colours.
        batch_size: Windows at a time.
        device: Where to compute: auto, cpu, cuda or cuda:1.
        include: Only images that fit one of these globs, separated by commas.

    Returns:
        `masks` (how many), the folder `out`, `classes` with the share of pixels of each, and `skipped` images.

    Raises:
        UsageError: No such model, no image, or a folder that is not empty.
    """
    from patchloom.segment.predict import write_masks

    return write_masks(run, images, out, batch_size=batch_size, device=device, include=include)


def export(
    run: str,
    out: str,
    *,
    image_size: Size | None = None,
    opset: int = 18,
    normalize: bool = False,
    overwrite: bool = False,
) -> str:
    """Write a trained decoder and its encoder as one ONNX file.

    Args:
        run: Run of `patchloom segment`, or its model.
        out: File to write.
        image_size: Side of the images in pixels, or height and width (256,128); default: that of the windows it was
            trained on.
        opset: ONNX operator set.
        normalize: Put the normalisation into the ONNX model, which then takes images in [0, 1].
        overwrite: Replace what is there.

    Returns:
        The path written. The ONNX model maps `images` (batch, channels, height, width), normalised, to `logits` (batch,
        classes, height, width) of the same size; its metadata hold the names of the classes, `mean` and `std`. It is
        compared with onnxruntime before it is written.

    Raises:
        UsageError: No such model, `out` exists, or the encoder cannot take images of that size.
        MissingExtraError: ONNX packages are not installed.
    """
    from patchloom.segment.onnx_model import write_onnx

    return write_onnx(run, out, image_size=image_size, opset=opset, normalized=normalize, overwrite=overwrite)
