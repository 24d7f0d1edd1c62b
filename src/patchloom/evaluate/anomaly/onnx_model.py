"""The whole detector as one ONNX file: what stands out, excision, repair, map and score."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from torch import Tensor, nn

from patchloom.errors import UsageError
from patchloom.io import check_place
from patchloom.models.bundle import open_encoder
from patchloom.models.onnx_file import export_module, need_onnx
from patchloom.systems.ear.model import EAR, AttentionSaliency
from patchloom.systems.ear.saved import load_ear

OUTPUTS = ["anomaly_map", "pred_score", "normalized_score", "mask"]


class Flat(nn.Module):
    """A detector whose results stand in a fixed order."""

    def __init__(self, model: EAR) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return what `OUTPUTS` names."""
        found = self.model(images)
        score = found["pred_score"]
        return found["anomaly_map"], score, self.model.normalized(score), found["mask"]


def write_onnx(run: str, out: str, *, encoder: str | None, opset: int, overwrite: bool) -> str:
    """Write the file; see `commands.export` for what goes in, comes out and is raised."""
    need_onnx()
    path = check_place(out)
    if path.exists() and not overwrite:
        raise UsageError(f"{out} exists; choose another out, or set overwrite to replace it")
    saved = load_ear(run, None if encoder is None else open_encoder(encoder))
    model = saved.model
    notes = {
        "threshold": repr(float(model.threshold)),
        "pixel_threshold": repr(float(model.pixel_threshold)),
        **{name: str(value) for name, value in saved.reading.items()},
    }
    shape = (int(saved.about["unet"]["in_channels"]), *saved.image_size)
    own = cast(AttentionSaliency, model.saliency).encoder
    export_module(Flat(model), own, shape, Path(path), opset, outputs=OUTPUTS, notes=notes)
    return out
