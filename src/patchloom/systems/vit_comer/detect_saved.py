"""A detector on disk: the encoder's bundle, and beside it what Mask R-CNN and ViT-CoMer have besides."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from patchloom.errors import UsageError
from patchloom.io import write_json, written_whole
from patchloom.models.bundle import find_bundle
from patchloom.models.bundle import load as load_bundle
from patchloom.systems.vit_comer.detector import Detector, DetectorShape

WEIGHTS, ABOUT = "detector.safetensors", "detector.json"
FORMAT = 1
OF_ENCODER = "backbone.body.encoder."


def save_detector(model: Detector, path: Path) -> None:
    """Write what a detector has besides its encoder into the folder of the encoder's bundle."""
    state = {name: x for name, x in model.state_dict().items() if not name.startswith(OF_ENCODER)}
    with written_whole(path / WEIGHTS) as temporary:
        save_file({name: value.detach().cpu().contiguous() for name, value in state.items()}, temporary)
    about = {"format": FORMAT, "class_names": model.class_names, "shape": asdict(model.shape), "comer": model.settings}
    write_json(path / ABOUT, about)


def load_detector(path: str | Path) -> Detector:
    """Return the detector of a run or bundle, in eval mode: images (list of (C, H, W) in [0, 1]) to objects.

    Raises:
        UsageError: There is none, or its files are damaged.
    """
    folder = find_bundle(path)
    if not (folder / ABOUT).exists():
        raise UsageError(f"{path} holds no detector; train one: patchloom detect vit_comer --data … --out …")
    encoder = load_bundle(folder)
    try:
        about: dict[str, Any] = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        if about["format"] != FORMAT:
            raise UsageError(f"{folder / ABOUT} is of format {about['format']}, and this version reads {FORMAT}")
        shape = DetectorShape(**{**about["shape"], "layers": tuple(about["shape"]["layers"])})
        model = Detector(encoder, about["class_names"], shape, frozen=True, settings=about["comer"])
        missing, extra = model.load_state_dict(load_file(folder / WEIGHTS), strict=False)
        if lost := [name for name in missing if not name.startswith(OF_ENCODER)] + extra:
            raise ValueError(f"its tensors are not those of a detector: {', '.join(lost[:4])}")
    except UsageError:
        raise
    except Exception as error:  # JSON, safetensors and shapes fail in ways of their own
        raise UsageError(f"the detector in {folder} is damaged: {' '.join(str(error).split())[:200]}") from error
    return model.eval()
