"""A timm module as one ONNX file, checked against onnxruntime."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from patchloom.encoders import in_chans, input_size, kind_of, normalize
from patchloom.errors import MissingExtraError
from patchloom.io import make_folder

TOLERANCE = 1e-4


class ExportMismatchError(RuntimeError):
    """The exported model gives other numbers than the original; nothing was written."""


def need_onnx() -> None:
    """Say which extra is missing before anything is computed.

    Raises:
        MissingExtraError: ONNX packages are not installed.
    """
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("onnx, onnxruntime and onnxscript", "onnx", "ONNX export") from error


class Normalised(nn.Module):
    """A model that takes images in [0, 1]."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.model(normalize(images, self.model))
        return features


def input_notes(encoder: Any, *, normalized: bool) -> dict[str, str]:
    """Return what has to be done to an image before a model takes it, as the metadata of an ONNX file has it.

    `mean` and `std` per channel, by which images in [0, 1] are normalised (left out where the model does that itself);
    `value_range` and `use_channels` where the bundle knows them: what stored values become 0 and 1, which channels of a
    file are meant. `class_names`, in the order of the outputs, where a classifier knows them.
    """
    known = encoder.pretrained_cfg
    statistics = {} if normalized else {name: json.dumps(list(known[name])) for name in ("mean", "std")}
    names = known.get("label_names") if encoder.num_classes else None
    classes = {"class_names": json.dumps(list(names))} if names else {}
    return {**statistics, **{name: str(value) for name, value in (known.get("reading") or {}).items()}, **classes}


def export_onnx(model: nn.Module, encoder: Any, path: Path, opset: int, notes: dict[str, str] | None = None) -> None:
    """Write `model`, `encoder` or a wrapper of it, to `path`; nothing is written where onnxruntime disagrees.

    Args:
        model: What is written.
        encoder: The timm module in it.
        path: The file.
        opset: ONNX operator set.
        notes: Metadata of the file.
    """
    output = "logits" if encoder.num_classes else "features"
    shape = (in_chans(encoder), *input_size(encoder))
    export_module(model, encoder, shape, path, opset, name=f"{kind_of(encoder)}s", outputs=[output], notes=notes)


def export_module(
    model: nn.Module,
    encoder: nn.Module | None,
    shape: tuple[int, ...],
    path: Path,
    opset: int,
    *,
    name: str = "images",
    outputs: Sequence[str],
    notes: dict[str, str] | None = None,
    rows: tuple[str, int] | None = None,
) -> None:
    """Write a module of one input, or two; nothing is written where onnxruntime disagrees.

    Args:
        model: Takes (B, *shape), and returns a tensor or a tuple of them.
        encoder: The timm module in it, if there is one.
        shape: Of one sample.
        path: The file.
        opset: ONNX operator set.
        name: Of the input.
        outputs: Names of the outputs.
        notes: Metadata of the file.
        rows: Name and width of a second input, (B, any number from 2, width).
    """
    generator = torch.Generator().manual_seed(0)
    examples: tuple[torch.Tensor, ...] = (torch.rand(2, *shape, generator=generator),)
    batch = torch.export.Dim("batch")
    dynamic: tuple[dict[int, Any], ...] = ({0: batch},)
    if rows is not None:
        examples += (torch.rand(2, 5, rows[1], generator=generator),)
        dynamic += ({0: batch, 1: torch.export.Dim(rows[0], min=2)},)
    model = model.eval()
    make_folder(path.parent)
    folder = Path(tempfile.mkdtemp(prefix=".onnx.", dir=path.parent))
    try:
        file = folder / path.name
        with _quiet(), _attention_spelled_out(nn.Identity() if encoder is None else encoder):
            torch.onnx.export(
                model,
                examples,
                file,
                dynamo=True,
                opset_version=opset,
                input_names=[name, *([] if rows is None else [rows[0]])],
                output_names=list(outputs),
                dynamic_shapes=dynamic,
                external_data=False,
                verbose=False,
            )
        _check(model, file, shape, rows)
        if notes:
            import onnx

            written = onnx.load(file)
            onnx.helper.set_model_props(written, notes)
            onnx.save(written, file)
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
def _check(model: nn.Module, file: Path, shape: tuple[int, ...], rows: tuple[str, int] | None = None) -> None:
    """Compare with onnxruntime at several batch sizes."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    generator = torch.Generator().manual_seed(1)
    for batch in (1, 3):
        inputs = [torch.rand(batch, *shape, generator=generator)]
        if rows is not None:
            inputs.append(torch.rand(batch, 2 * batch, rows[1], generator=generator))
        found = model(*inputs)
        expected = found if isinstance(found, tuple) else (found,)
        given = {place.name: value.numpy() for place, value in zip(session.get_inputs(), inputs, strict=True)}
        for got, wanted in zip(session.run(None, given), expected, strict=True):
            difference = float((torch.from_numpy(got) - wanted).abs().max() / wanted.abs().max().clamp(min=1.0))
            if got.shape != tuple(wanted.shape) or not difference <= TOLERANCE:
                raise ExportMismatchError(
                    f"onnxruntime differs from torch by {difference:.2g} at batch {batch}; nothing was written"
                )
