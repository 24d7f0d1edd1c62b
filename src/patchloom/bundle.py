"""A model on disk: timm's own hub layout, plus where it comes from.

`model.safetensors` and `config.json` are what `timm.create_model("local-dir:PATH")` reads, with no Patchloom
installed; `patchloom.json` holds the lineage.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from patchloom import __version__
from patchloom.errors import UsageError

WEIGHTS, CONFIG, LINEAGE = "model.safetensors", "config.json", "patchloom.json"
# Names registered here are written as an entry point timm has by itself; all that differs stands in model_args.
TIMM_NAMES = {"ccvit_": "beit_base_patch16_224"}


def save_bundle(
    encoder: nn.Module, path: str | Path, *, lineage: dict[str, Any] | None = None, overwrite: bool = False
) -> Path:
    """Write a bundle; the folder appears whole or not at all.

    Args:
        encoder: Made by `create_encoder` or `load`; with a classifier or without.
        path: Folder to make.
        lineage: What made the model, and from what; kept in `patchloom.json`.
        overwrite: Replace a bundle that is there.

    Raises:
        UsageError: The folder exists and is not to be replaced, or is no bundle.
    """
    target = Path(path)
    if target.exists():
        if not overwrite:
            raise UsageError(f"{target} exists; choose another folder, or set overwrite to replace it")
        if any(target.iterdir()) and not (target / CONFIG).exists():
            raise UsageError(f"{target} is not empty and holds no bundle, so it is not replaced")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        save_file({k: v.detach().cpu().contiguous() for k, v in encoder.state_dict().items()}, temporary / WEIGHTS)
        _write(temporary / CONFIG, timm_config(encoder))
        versions = {"patchloom": __version__, "torch": torch.__version__, "timm": timm.__version__}
        about = {"lineage": lineage or {}, "versions": versions, "made_from": encoder.patchloom_args}
        _write(temporary / LINEAGE, about)
        temporary.chmod(0o755)
        if target.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
            target.replace(old / "bundle")
            temporary.replace(target)
            shutil.rmtree(old)
        else:
            temporary.replace(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return target


def timm_config(encoder: nn.Module) -> dict[str, Any]:
    """Return the `config.json` timm reads: architecture, its arguments, how to prepare images."""
    made = encoder.patchloom_args
    architecture, model_args = made["architecture"], dict(made["model_args"])
    for prefix, name in TIMM_NAMES.items():
        if architecture.startswith(prefix):
            architecture, model_args = name, _full_arguments(encoder) | model_args
    num_classes = int(encoder.num_classes)
    model_args.pop("num_classes", None)
    side = tuple(encoder.patch_embed.img_size)
    channels = model_args.get("in_chans", 3)
    known = dict(encoder.pretrained_cfg)
    keep = ("mean", "std", "interpolation", "crop_pct", "crop_mode", "first_conv", "classifier")
    pretrained = {name: known[name] for name in keep if name in known}
    pretrained |= {"input_size": [channels, *side], "num_classes": num_classes, "fixed_input_size": True}
    return {
        "architecture": architecture,
        "num_classes": num_classes,
        "num_features": int(encoder.num_features),
        "global_pool": encoder.global_pool,
        "pretrained_cfg": pretrained,
        "model_args": _plain(model_args),
    }


def load(path: str | Path) -> nn.Module:
    """Return the timm module of a bundle, or of a run (its `model/`), in eval mode.

    Raises:
        UsageError: There is no bundle, or it is damaged.
    """
    folder = find_bundle(path)
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        state = load_file(folder / WEIGHTS)
    except (OSError, json.JSONDecodeError, SafetensorError) as error:
        raise UsageError(f"the bundle in {folder} is damaged ({' '.join(str(error).split())[:200]})") from error
    arguments = {"in_chans": 3, **config.get("model_args", {})}
    arguments = {k: tuple(v) if isinstance(v, list) else v for k, v in arguments.items()}
    model: nn.Module = timm.create_model(
        config["architecture"], pretrained=False, num_classes=config["num_classes"], **arguments
    )
    missing, unexpected = model.load_state_dict(state, strict=False)
    if missing or unexpected:
        raise UsageError(
            f"the bundle in {folder} does not fit {config['architecture']}: missing {missing[:4]}, "
            f"left over {unexpected[:4]}"
        )
    model.pretrained_cfg = {**model.pretrained_cfg, **config.get("pretrained_cfg", {})}
    about = folder / LINEAGE
    own = json.loads(about.read_text(encoding="utf-8")).get("made_from") if about.exists() else None
    arguments["img_size"] = tuple(model.patch_embed.img_size)
    model.patchloom_args = {
        # The name the user knows, where the arguments reproduce it; timm's entry point otherwise.
        "architecture": own["architecture"] if own and timm.is_model(own["architecture"]) else config["architecture"],
        "model_args": arguments,
    }
    return model.eval()


def find_bundle(path: str | Path) -> Path:
    """Return the bundle folder meant by the path of a bundle or of a run.

    Raises:
        UsageError: Neither.
    """
    folder = Path(path)
    for candidate in (folder, folder / "model"):
        if (candidate / CONFIG).exists() and (candidate / WEIGHTS).exists():
            return candidate
    what = "does not exist" if not folder.exists() else f"holds no {CONFIG} and {WEIGHTS}"
    raise UsageError(f"there is no bundle at {path}: it {what}; give a run folder or its model/")


def read_lineage(path: str | Path) -> dict[str, Any]:
    """Return what made the model of a bundle or run; empty for a bundle of another maker."""
    file = find_bundle(path) / LINEAGE
    if not file.exists():
        return {}
    lineage: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))["lineage"]
    return lineage


def bundle_fingerprint(path: str | Path) -> str:
    """Return a short hash of a bundle's weights."""
    digest = hashlib.sha256()
    with (find_bundle(path) / WEIGHTS).open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()[:16]


def _full_arguments(encoder: Any) -> dict[str, Any]:
    """Return all arguments that rebuild a `Beit` of any shape from a plain entry point."""
    block = encoder.blocks[0]
    return {
        "img_size": tuple(encoder.patch_embed.img_size),
        "patch_size": int(encoder.patch_embed.patch_size[0]),
        "in_chans": int(encoder.patch_embed.proj.weight.shape[1]),
        "embed_dim": int(encoder.embed_dim),
        "depth": len(encoder.blocks),
        "num_heads": int(block.attn.num_heads),
        "mlp_ratio": block.mlp.fc1.out_features / encoder.embed_dim,
        "qkv_bias": block.attn.q_bias is not None,
        "init_values": block.init_values,
        "use_abs_pos_emb": encoder.pos_embed is not None,
        "use_rel_pos_bias": block.attn.relative_position_bias_table is not None,
        "use_shared_rel_pos_bias": encoder.rel_pos_bias is not None,
        "global_pool": encoder.global_pool,
        "use_fc_norm": not isinstance(encoder.fc_norm, nn.Identity),
    }


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def _write(path: Path, values: dict[str, Any]) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(values, file, indent=2, default=str)
        file.flush()
        os.fsync(file.fileno())
