"""Aligned towers on disk: a folder that open_clip opens without this package, and back.

model, _, preprocess = open_clip.create_model_and_transforms("local-dir:runs/x/model/open_clip")
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file

from patchloom.encoders import image_size, in_chans
from patchloom.errors import UsageError
from patchloom.io import write_json
from patchloom.models.bundle import load, made_from
from patchloom.systems.clip.model import CLIP
from patchloom.systems.clip.text import VOCABULARY, TextTower

FOLDER, CONFIG, WEIGHTS = "open_clip", "open_clip_config.json", "open_clip_model.safetensors"
TEXT_FIELDS = ("context_length", "vocab_size", "width", "heads", "layers")
IDLE_TEXT = {"hf_tokenizer_name": None, "mlp_ratio": 4.0, "pool_type": "argmax", "embed_cls": False}
"""Settings of open_clip's text towers that are as here, where a file has them."""


def text_config(tower: TextTower) -> dict[str, Any]:
    """Return open_clip's settings of a text tower."""
    found = {name: int(getattr(tower, name)) for name in TEXT_FIELDS if name != "layers"}
    return {**found, "layers": int(tower.transformer.layers)}


def save_clip(model: CLIP, bundle: Path) -> Path:
    """Write towers into a folder of the bundle of their trunk, `open_clip/`.

    Args:
        model: The towers.
        bundle: The bundle of `model.visual.trunk`, which is there already.
    """
    folder = bundle / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    trunk: Any = model.visual.trunk
    height, width = image_size(trunk)
    known = trunk.pretrained_cfg
    config = {
        "model_cfg": {
            "embed_dim": int(model.text.output_dim),
            "vision_cfg": {
                "timm_model_name": _timm_name(trunk, bundle),
                "timm_model_pretrained": False,
                "timm_pool": "",
                "timm_proj": "linear",
                "image_size": height if height == width else [height, width],
            },
            "text_cfg": text_config(model.text),
            "custom_text": True,
        },
        "preprocess_cfg": {
            "size": [height, width],
            "mode": "RGB",
            "mean": list(known["mean"]),
            "std": list(known["std"]),
            "interpolation": "bicubic",
            "resize_mode": "shortest",
        },
    }
    state = {name: value.detach().cpu().contiguous().clone() for name, value in model.state_dict().items()}
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    write_json(folder / CONFIG, config)
    return folder


def _timm_name(trunk: Any, bundle: Path) -> str:
    """Return the name by which open_clip, which hands timm no arguments, gets the trunk.

    A model of another size than its name says, or made with other arguments, is built from its bundle.
    """
    about = made_from(trunk)
    name = str(about["architecture"])
    with torch.device("meta"):
        plain = timm.create_model(name, num_classes=0)
    given = {key: value for key, value in about["model_args"].items() if key not in ("img_size", "in_chans")}
    shapes = {key: value.shape for key, value in plain.state_dict().items()}
    as_named = not given and in_chans(trunk) == 3
    as_named &= shapes == {key: value.shape for key, value in trunk.state_dict().items()}
    ours = timm.model_entrypoint(name).__module__.startswith("patchloom.")
    if as_named and not ours:
        return name
    if ours and name.startswith("vitamin_"):  # whose shape no file of settings can tell
        if as_named:
            print(f"open_clip opens {bundle / FOLDER} after import patchloom, which names {name}", file=sys.stderr)
        return name
    return f"local-dir:{bundle.resolve()}"


def load_clip(path: str | Path) -> CLIP:
    """Return the towers of a run of align clip, its bundle or its open_clip folder, in eval mode.

    Raises:
        UsageError: There are none, or they are damaged, or of another sort than those trained here.
    """
    folder = find_clip(path)
    config, state = _read(folder)
    bundle = folder.parent
    trunk: Any = load(bundle)
    trunk.reset_classifier(0)
    model = CLIP(trunk, _text_tower(config, folder))
    fits = model.load_state_dict(state, strict=False)
    if fits.missing_keys or fits.unexpected_keys:
        wrong = [*fits.missing_keys, *fits.unexpected_keys]
        raise UsageError(f"{folder} does not fit its bundle ({', '.join(wrong[:4])} missing or left over)")
    return model.eval()


def load_text(path: str | Path) -> TextTower:
    """Return the text tower of a run, a bundle, or a folder of open_clip, whatever its image tower.

    Raises:
        UsageError: There is none, or it is of another sort than those here.
    """
    folder = find_clip(path)
    config, state = _read(folder)
    tower = _text_tower(config, folder)
    texts = {name.removeprefix("text."): value for name, value in state.items() if name.startswith("text.")}
    if not texts:  # the layout without custom_text has the tower's tensors at the top
        names = tower.state_dict()
        texts = {name: value for name, value in state.items() if name in names}
    fits = tower.load_state_dict(texts, strict=False)
    if fits.missing_keys or fits.unexpected_keys:
        wrong = [*fits.missing_keys, *fits.unexpected_keys]
        raise UsageError(f"the text tower of {folder} is of another sort ({', '.join(wrong[:4])} missing or left over)")
    return tower


def read_text_config(path: str | Path) -> dict[str, Any]:
    """Return the settings of the text tower of a run, bundle or open_clip folder, and `embed_dim`.

    Raises:
        UsageError: There is none.
    """
    config = _read_config(find_clip(path))
    return {**config["text_cfg"], "embed_dim": config["embed_dim"]}


def find_clip(path: str | Path) -> Path:
    """Return the open_clip folder of a run, of a bundle, or the folder itself.

    Raises:
        UsageError: There is none.
    """
    for folder in (Path(path), Path(path) / FOLDER, Path(path) / "model" / FOLDER):
        if (folder / CONFIG).exists():
            return folder
    raise UsageError(f"there are no aligned towers at {path} (no {CONFIG}); give a run of patchloom align clip")


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["model_cfg"]
        config["text_cfg"], config["embed_dim"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{folder / CONFIG} is damaged ({type(error).__name__}: {error})") from error
    return config


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    config = _read_config(folder)
    from patchloom.base.stored import read_tensors

    files = [folder / WEIGHTS, *sorted(folder.glob("open_clip*.safetensors"))]
    file = next((each for each in files if each.exists()), None)
    if file is None:
        raise UsageError(f"{folder} holds no {WEIGHTS}")
    return config, dict(read_tensors(file))


def _text_tower(config: dict[str, Any], folder: Path) -> TextTower:
    text = dict(config["text_cfg"])
    for name, idle in IDLE_TEXT.items():
        if text.pop(name, idle) != idle:
            raise UsageError(f"the text tower of {folder} has another {name} than those here; its tokens are others")
    sizes = {"context_length": 77, "vocab_size": VOCABULARY, "width": 512, "heads": 8, "layers": 12}
    if unknown := sorted(set(text) - set(sizes)):
        raise UsageError(f"the text tower of {folder} has settings that those here have not: {', '.join(unknown)}")
    return TextTower(output_dim=int(config["embed_dim"]), **{**sizes, **text})
