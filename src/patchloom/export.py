"""A bundle in the formats others read: ONNX, and timm's own.

>>> import patchloom as pl
>>> pl.export("runs/mine/model", out="mine.onnx", format="onnx")  # doctest: +SKIP
"""

from __future__ import annotations

import logging
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from patchloom._lazy import make_callable
from patchloom.encoders import image_size, in_chans
from patchloom.errors import MissingExtraError, UsageError, unknown_name
from patchloom.io import check_place, make_folder

TOLERANCE = 1e-4


class ExportMismatchError(RuntimeError):
    """The exported model gives other numbers than the original; nothing was written."""


def export(
    bundle: str,
    out: str,
    format: Literal["onnx", "timm"] = "onnx",
    image_size: int | None = None,
    opset: int = 18,
    normalize: bool = False,
    overwrite: bool = False,
) -> str:
    """Write a bundle in another format.

    Args:
        bundle: Bundle or run folder.
        out: File (onnx) or folder (timm) to write.
        format: onnx: one file, any batch size, checked against onnxruntime. timm: a clean copy of the bundle.
        image_size: Side of the images in pixels; default: the model's. Positions are resampled where it differs.
        opset: ONNX operator set.
        normalize: Put the normalisation into the ONNX model, which then takes images in [0, 1].
        overwrite: Replace what is there.

    Returns:
        The path written. The ONNX model maps `images` (batch, channels, height, width), normalised, to `features`
        (batch, width), or to `logits` where the bundle has a classifier.

    Raises:
        UsageError: There is no such bundle, `out` exists, or the encoder cannot take images of that size.
        MissingExtraError: ONNX packages are not installed.
        ExportMismatchError: onnxruntime disagrees with torch by more than 1e-4.
    """
    from patchloom.bundle import load, read_lineage, save_bundle
    from patchloom.encoders import set_image_size

    if format not in ("onnx", "timm"):
        raise unknown_name("format", format, ("onnx", "timm"))
    path = check_place(out)
    if path.exists() and not overwrite:
        raise UsageError(f"{out} exists; choose another place, or set overwrite to replace it")
    if format == "onnx":
        _need_onnx()
        if path.is_dir() or not path.suffix:
            raise UsageError(f"{out} is no name of a file; write one such as {out}/model.onnx")
    model: Any = load(bundle)
    if image_size is not None:
        set_image_size(model, image_size)
    if format == "timm":
        save_bundle(model, path, lineage=read_lineage(bundle), overwrite=overwrite)
        return str(path)
    _export_onnx(_Normalised(model) if normalize else model, model, path, opset)
    return str(path)


class _Normalised(nn.Module):
    """A model that takes images in [0, 1]."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        from patchloom.encoders import normalize

        features: torch.Tensor = self.model(normalize(images, self.model))
        return features


def _need_onnx() -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("onnx, onnxruntime and onnxscript", "onnx", "ONNX export") from error


def _export_onnx(model: nn.Module, encoder: Any, path: Path, opset: int) -> None:
    channels, (height, width) = in_chans(encoder), image_size(encoder)
    generator = torch.Generator().manual_seed(0)
    example = torch.rand(2, channels, height, width, generator=generator)
    name = "logits" if encoder.num_classes else "features"
    model = model.eval()
    make_folder(path.parent)
    folder = Path(tempfile.mkdtemp(prefix=".onnx.", dir=path.parent))
    try:
        file = folder / path.name
        with _quiet(), _attention_spelled_out(encoder):
            torch.onnx.export(
                model,
                (example,),
                file,
                dynamo=True,
                opset_version=opset,
                input_names=["images"],
                output_names=[name],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                external_data=False,
                verbose=False,
            )
        _check(model, file, (channels, height, width))
        file.replace(path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _attention_spelled_out(encoder: nn.Module) -> Iterator[None]:
    """Compute attention in plain operations: the fused one of a `Beit` with a bias per block does not translate."""
    fused: list[Any] = [module for module in encoder.modules() if getattr(module, "fused_attn", False)]
    for module in fused:
        module.fused_attn = False
    try:
        yield
    finally:
        for module in fused:
            module.fused_attn = True


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's notes to its developers off the terminal; errors are raised all the same."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@torch.no_grad()
def _check(model: nn.Module, file: Path, shape: tuple[int, int, int]) -> None:
    """Compare with onnxruntime at several batch sizes."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    generator = torch.Generator().manual_seed(1)
    for batch in (1, 3):
        images = torch.rand(batch, *shape, generator=generator)
        expected = model(images)
        got = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
        difference = float((got - expected).abs().max() / expected.abs().max().clamp(min=1.0))
        if got.shape != expected.shape or not difference <= TOLERANCE:
            raise ExportMismatchError(
                f"onnxruntime differs from torch by {difference:.2g} at batch {batch}; nothing was written"
            )


make_callable(__name__, export)
