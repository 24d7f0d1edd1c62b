"""A point classifier on disk: the encoder's bundle, and beside it the tensors and settings of what classifies points.

`patchloom.load` gives the `PointSegmenter`, from images to logits; who wants an encoder finds the bundle's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from patchloom.data.mask_values import MaskCoding
from patchloom.errors import UsageError
from patchloom.io import write_json, written_whole
from patchloom.models.bundle import find_bundle
from patchloom.models.bundle import load as load_bundle
from patchloom.systems.vit_p.model import PointViT
from patchloom.systems.vit_p.segmenter import PointSegmenter, arguments

WEIGHTS, ABOUT = "point.safetensors", "point.json"
FORMAT = 1


def save_points(model: PointSegmenter, path: Path, proposals: str, coding: MaskCoding | None = None) -> None:
    """Write what a model has besides its encoder into the folder of the encoder's bundle.

    Args:
        model: The model.
        path: The folder.
        proposals: Name of the generator of masks.
        coding: How the masks were read that it learnt from.
    """
    state = {name: x for name, x in model.classifier.state_dict().items() if not name.startswith("encoder.")}
    with written_whole(path / WEIGHTS) as temporary:
        save_file({name: value.detach().cpu().contiguous() for name, value in state.items()}, temporary)
    about = {
        "format": FORMAT,
        "image_size": list(model.image_size),
        "interpolate_offset": model.classifier.interpolate_offset,
        "start": model.classifier.start,
        "class_names": model.class_names,
        "palette": [list(colour) for colour in model.palette],
        "proposals": proposals,
        "masks": None if coding is None else coding.describe(),
        "settings": arguments(model),
    }
    write_json(path / ABOUT, about)


def load_points(path: str | Path, proposals: str | None = None) -> PointSegmenter:
    """Return the model of a run of `patchloom segment point`, or of its bundle, in eval mode.

    Args:
        path: The run or bundle.
        proposals: Another generator of masks than that of the run, see `open_proposals`; opened when it is needed.

    Raises:
        UsageError: There is none, or its files are damaged.
    """
    folder = find_bundle(path)
    if not (folder / ABOUT).exists():
        raise UsageError(f"{path} holds no point classifier; train one: patchloom segment point --data … --out …")
    encoder = load_bundle(folder)
    try:
        about: dict[str, Any] = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        if about["format"] != FORMAT:
            raise UsageError(f"{folder / ABOUT} is of format {about['format']}, and this version reads {FORMAT}")
        classifier = PointViT(encoder, len(about["class_names"]), about["interpolate_offset"], about["start"])
        missing, extra = classifier.load_state_dict(load_file(folder / WEIGHTS), strict=False)
        if lost := [name for name in missing if not name.startswith("encoder.")] + extra:
            raise ValueError(f"its tensors are not those of a point classifier: {', '.join(lost[:4])}")
        palette = [(int(r), int(g), int(b)) for r, g, b in about["palette"]]
        height, width = about["image_size"]
        generator = about["proposals"] if proposals is None else proposals
        model = PointSegmenter(
            classifier, generator, (height, width), about["class_names"], palette, **about["settings"]
        )
    except UsageError:
        raise
    except Exception as error:  # JSON, safetensors and shapes fail in ways of their own
        raise UsageError(f"the classifier in {folder} is damaged: {' '.join(str(error).split())[:200]}") from error
    return model.eval()
