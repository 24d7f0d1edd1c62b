"""Commands of `patchloom anomaly` besides training; what they need is loaded when they run."""

from __future__ import annotations

from typing import Any


def predict(
    run: str,
    images: str,
    out: str,
    *,
    encoder: str | None = None,
    threshold: float | None = None,
    device: str = "auto",
    include: str | None = None,
    exclude: str | None = None,
) -> dict[str, Any]:
    """Write what a trained detector says of images: scores, maps, overlays and masks, at the images' own size.

    Args:
        run: Run of `patchloom anomaly ear`, or its model.
        images: Folder of images.
        out: Folder to write to; empty or absent. `scores.csv` has a row for each image; the map of a/b.jpg is
            maps/a/b.tiff (32-bit floats, the higher the likelier a defect), overlays/a/b.png shows it on the image,
            masks/a/b.png what lies above the threshold of pixels.
        encoder: The frozen encoder of the run, where it is no longer where it was.
        threshold: Score from which on an image counts as defect; default: what the run set.
        device: Where to compute: auto, cpu, cuda or cuda:1.
        include: Only images that fit one of these globs, separated by commas.
        exclude: Leave out images that fit one of these globs, separated by commas.

    Returns:
        `images` (how many), `defects` (how many were called so), the `threshold`, the folder `out`, `skipped` images.

    Raises:
        UsageError: No such model, its encoder is another, no image, or a folder that is not empty.
    """
    from patchloom.evaluate.anomaly.predict import write_predictions

    return write_predictions(
        run, images, out, encoder=encoder, threshold=threshold, device=device, include=include, exclude=exclude
    )


def export(run: str, out: str, *, encoder: str | None = None, opset: int = 18, overwrite: bool = False) -> str:
    """Write a trained detector as one ONNX file, from image to score, the frozen encoder in it.

    Args:
        run: Run of `patchloom anomaly ear`, or its model.
        out: File to write.
        encoder: The frozen encoder of the run, where it is no longer where it was.
        opset: ONNX operator set.
        overwrite: Replace what is there.

    Returns:
        The path written. The ONNX model maps `images` (batch, channels, height, width) in [0, 1], of the size the model
        was trained at, to `anomaly_map` (batch, 1, height, width), `pred_score` (batch), `normalized_score` (batch, 0.5
        at the threshold) and `mask` (batch, 1, height, width), what was excised. Its metadata hold `threshold` and
        `pixel_threshold`. It is compared with onnxruntime before it is written.

    Raises:
        UsageError: No such model, its encoder is another, or `out` exists.
        MissingExtraError: ONNX packages are not installed.
    """
    from patchloom.evaluate.anomaly.onnx_model import write_onnx

    return write_onnx(run, out, encoder=encoder, opset=opset, overwrite=overwrite)
