"""Commands of `patchloom segment` besides training; what they need is loaded when they run."""

from __future__ import annotations

from typing import Any, Literal

from patchloom.base.sizes import Size


def predict(
    run: str,
    images: str,
    out: str,
    *,
    task: Literal["semantic", "panoptic", "instance"] = "semantic",
    overlays: bool = False,
    proposals: str | None = None,
    batch_size: int = 8,
    device: str = "auto",
    include: str | None = None,
) -> dict[str, Any]:
    """Write the masks a trained decoder makes of images.

    Args:
        run: Run of `patchloom segment`, or its model.
        images: Folder of images; of runs of segment unetr, volumes:FOLDER.
        out: Folder to write to; empty or absent. The mask of a/b.jpg is a/b.png, indexed: its indices are classes, its
            palette their colours; 255 is a pixel of no class. That of a volume is NIfTI, on the axes of its file.
        task: `semantic`, or, of runs of segment point that were told which classes are things: `panoptic`, whose PNGs
            hold the id of each pixel's segment as R + 256 G + 65536 B, with `panoptic.json` as COCO has it; or
            `instance`, with `instances.json`, COCO's results (extra `detection`), `index.json` and PNGs of ids, the
            best on top.
        overlays: Also draw each mask over its image, to `overlays/a/b.png`.
        proposals: Of runs of segment point: another generator of masks.
        batch_size: Windows at a time.
        device: Where to compute: auto, cpu, cuda or cuda:1.
        include: Only images that fit one of these globs, separated by commas.

    Returns:
        `masks` (how many), the folder `out`, `classes` with the share of pixels of each (or `segments`, how many), and
        `skipped` images.

    Raises:
        UsageError: No such model, no image, a folder that is not empty, or a task that the model cannot do.
        MissingExtraError: `instance` without pycocotools.
    """
    from patchloom.segment.predict import write_masks

    return write_masks(
        run,
        images,
        out,
        task=task,
        overlays=overlays,
        proposals=proposals,
        batch_size=batch_size,
        device=device,
        include=include,
    )


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
        classes, height, width) of the same size; of a run of segment point `images` and `points` (batch, 2 or more, row
        and column in [-1, 1]) to `logits` (batch, points, classes): what draws masks is no part of it. Its metadata
        hold the names of the classes, `mean` and `std`. It is compared with onnxruntime before it is written.

    Raises:
        UsageError: No such model, `out` exists, or the encoder cannot take images of that size.
        MissingExtraError: ONNX packages are not installed.
    """
    from patchloom.segment.onnx_model import write_onnx

    return write_onnx(run, out, image_size=image_size, opset=opset, normalized=normalize, overwrite=overwrite)
