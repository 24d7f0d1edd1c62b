"""A model on disk: timm's own hub layout, plus where it comes from.

`model.safetensors` and `config.json` are what `timm.create_model("local-dir:PATH", pretrained=True)` reads, with no
Patchloom installed (timm leaves the weights out without `pretrained=True`); `patchloom.json` holds the lineage. Any
image model of timm can be saved so; where an architecture is this package's own, and timm alone cannot open it,
`patchloom.json` says so.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from patchloom import registry
from patchloom.base.hub import fetching, reason
from patchloom.base.version import __version__
from patchloom.encoders import family_of, has_tokens, image_size, in_chans, input_size, size_arguments
from patchloom.errors import UsageError
from patchloom.io import make_folder

WEIGHTS, CONFIG, LINEAGE = "model.safetensors", "config.json", "patchloom.json"
# Names registered here are written as an entry point timm has by itself; all that differs stands in model_args.
TIMM_NAMES = {
    "ccvit_": "beit_base_patch16_224",
    "vit_micro_": "vit_base_patch16_224",
    "deit_micro_distilled_": "deit_base_distilled_patch16_224",
    **{f"vit_{size}_patch8_84": "vit_base_patch16_224" for size in ("tiny", "small", "base")},
}
# How a model was trained, not what it is.
REGULARISERS = {"drop_rate", "drop_path_rate", "attn_drop_rate", "proj_drop_rate", "pos_drop_rate", "patch_drop_rate"}


def save_bundle(
    encoder: Any, path: str | Path, *, lineage: dict[str, Any] | None = None, overwrite: bool = False
) -> Path:
    """Write a bundle; the folder appears whole or not at all.

    Args:
        encoder: Made by `create_encoder`, `load` or `timm.create_model`; with a classifier or without.
        path: Folder to make.
        lineage: What made the model, and from what; kept in `patchloom.json`.
        overwrite: Replace a bundle that is there.

    Raises:
        UsageError: The folder exists and is not to be replaced, or is no bundle; or the module cannot be rebuilt from
            an architecture and its arguments.
    """
    target = Path(path)
    if target.exists():
        if not overwrite:
            raise UsageError(f"{target} exists; choose another folder, or set overwrite to replace it")
        if not target.is_dir():
            raise UsageError(f"{target} is a file; a bundle is a folder")
        if any(target.iterdir()) and not (target / CONFIG).exists():
            raise UsageError(f"{target} is not empty and holds no bundle, so it is not replaced")
    config = timm_config(encoder)
    state = {name: value.detach().cpu().contiguous() for name, value in encoder.state_dict().items()}
    _check_rebuilds(config, state)
    versions = {"patchloom": __version__, "torch": torch.__version__, "timm": timm.__version__}
    about: dict[str, Any] = {"lineage": lineage or {}, "versions": versions, "made_from": made_from(encoder)}
    if timm.model_entrypoint(config["architecture"]).__module__.startswith("patchloom."):
        about["opened_by"] = "patchloom.load; timm alone does not know this architecture"
    if reading := (getattr(encoder, "pretrained_cfg", None) or {}).get("reading"):
        about["reading"] = reading
    make_folder(target.parent)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        save_file(state, temporary / WEIGHTS, metadata={"format": "pt"})
        _write(temporary / CONFIG, config)
        _write(temporary / LINEAGE, about)
        temporary.chmod(0o755)
        _put_in_place(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return target


def timm_config(encoder: Any) -> dict[str, Any]:
    """Return the `config.json` timm reads: architecture, its arguments, how to prepare images."""
    creation_args = made_from(encoder)
    architecture, model_args = creation_args["architecture"], dict(creation_args["model_args"])
    for prefix, name in TIMM_NAMES.items():
        if architecture.startswith(prefix):
            architecture, model_args = name, family_of(encoder).shape_arguments(encoder) | model_args
    num_classes = int(encoder.num_classes)
    model_args.pop("num_classes", None)
    sides = input_size(encoder)[-2:]  # timm takes no more; frames are an argument of the model
    channels = model_args.get("in_chans", 3)
    known = dict(encoder.pretrained_cfg)
    keep = ("mean", "std", "interpolation", "crop_pct", "crop_mode", "first_conv", "classifier", "label_names")
    pretrained = {name: known[name] for name in keep if name in known}
    # timm hands the size on to a model where it is said to be fixed; a convolutional network takes no such argument.
    fixed = "img_size" in model_args
    pretrained |= {"input_size": [channels, *sides], "num_classes": num_classes, "fixed_input_size": fixed}
    pooling = getattr(encoder, "global_pool", None)
    return {
        "architecture": architecture,
        "num_classes": num_classes,
        "num_features": int(encoder.num_features),
        **({"global_pool": pooling} if isinstance(pooling, str) else {}),
        "pretrained_cfg": pretrained,
        "model_args": _plain(model_args),
    }


def made_from(encoder: Any) -> dict[str, Any]:
    """Return the architecture an image model was made from, and the arguments that rebuild it without a classifier.

    Raises:
        UsageError: The module is no image model of timm.
    """
    creation_args = getattr(encoder, "patchloom_args", None)
    known = getattr(encoder, "pretrained_cfg", None) or {}
    if creation_args is None:
        creation_args = {"architecture": known.get("architecture"), "model_args": getattr(encoder, "_model_args", {})}
    if creation_args["architecture"] is None:
        raise UsageError(
            f"a {type(encoder).__name__} has no name to be made again by; register it with timm, and make it by "
            "create_encoder"
        )
    dropped = {*REGULARISERS, "num_classes"}
    arguments = {name: value for name, value in creation_args["model_args"].items() if name not in dropped}
    # Size and channels as they are now, whatever the encoder was made with.
    arguments["in_chans"] = in_chans(encoder)
    if has_tokens(encoder):
        arguments |= size_arguments(encoder)
    elif known.get("fixed_input_size"):
        arguments["img_size"] = image_size(encoder)
    return {"architecture": creation_args["architecture"], "model_args": arguments}


def load(path: str | Path, adapters: Sequence[str | Path] | Mapping[str, str | Path] = ()) -> Any:
    """Return the timm module of a bundle, or of a run (its `model/`), in eval mode.

    Args:
        path: The bundle or run; a run that trained an adapter stands for its encoder with the adapter in it.
        adapters: Adapters to put in, as runs or files (or by name in a mapping); the first of them acts.

    Raises:
        UsageError: There is no bundle, it is damaged, or an adapter was made for another encoder.
    """
    if not _holds_bundle(path) or adapters:
        from patchloom.models.adapters import add_adapters, find_adapter, load_adapted

        if adapters:
            return add_adapters(load(path), adapters).eval()
        if find_adapter(path) is not None:
            return load_adapted(path)
        for folder in (Path(path), Path(path) / "model"):
            for name, place in registry.ENCODERS.items():
                if (folder / name).exists():
                    return registry.load(place)(folder)  # by its place: systems stand above bundles
    folder = find_bundle(path)
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        architecture, num_classes = config["architecture"], int(config["num_classes"])
        arguments = {"in_chans": 3, **config.get("model_args", {})}
        state = load_file(folder / WEIGHTS)
    except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UsageError(f"the bundle in {folder} is damaged ({reason}); write it again") from error
    arguments = {name: tuple(value) if isinstance(value, list) else value for name, value in arguments.items()}
    model = _build(architecture, num_classes, arguments, folder)
    _check_tensors({name: tuple(value.shape) for name, value in state.items()}, model, f"the bundle in {folder}")
    model.load_state_dict(state)
    model.pretrained_cfg = {**model.pretrained_cfg, **config.get("pretrained_cfg", {})}
    about = _about(folder)
    if reading := about.get("reading"):
        model.pretrained_cfg["reading"] = reading
    # The name the user knows, where it is known here; timm's entry point otherwise.
    known_architecture = (about.get("made_from") or {}).get("architecture")
    name = known_architecture if known_architecture and timm.is_model(known_architecture) else architecture
    size_args = size_arguments(model) if has_tokens(model) else {}
    model.patchloom_args = {"architecture": name, "model_args": arguments | size_args}
    return model.eval()


def load_model(path: str | Path, adapters: Sequence[str | Path] | Mapping[str, str | Path] = ()) -> nn.Module:
    """Return the module of a bundle or run as it answers, in eval mode, see `load`.

    A model that is more than an encoder, as the tasks of `adapt gcab` are, comes as a whole.

    Raises:
        UsageError: There is no bundle, it is damaged, or an adapter was made for another encoder, or for a model that
            takes none.
    """
    if (opener := _opener(path)) is not None:
        if adapters:
            raise UsageError(f"{path} is more than an encoder, and takes no adapters; leave them out")
        whole: nn.Module = registry.load(opener)(path)  # by its place: systems stand above bundles
        return whole
    encoder: nn.Module = load(path, adapters)
    return encoder


def holds_more(path: str | Path) -> bool:
    """Return whether a bundle or run holds a model that is more than its encoder, as the tasks of `adapt gcab` are."""
    return _opener(path) is not None and _holds_bundle(path)


def _opener(path: str | Path) -> str | None:
    """Return the place of what opens a model that is more than an encoder; None where it is none."""
    for folder in (Path(path), Path(path) / "model"):
        for name, place in registry.MODELS.items():
            if (folder / name).exists():
                return place
    return None


def open_encoder(model: str | Path | nn.Module) -> Any:
    """Return a trained encoder as a user names it.

    Args:
        model: Path of a bundle or run; name of a timm model, whose published weights are fetched; or a module, which
            is returned as it is.

    Raises:
        UsageError: There is no such model, it has no published weights or they cannot be fetched, or the module is no
            image model of timm.
    """
    if isinstance(model, nn.Module):
        made_from(model)
        return model
    name = str(model)
    return load(name) if Path(name).exists() else fetch_encoder(name).eval()


def fetch_encoder(name: str, create: Callable[..., Any] | None = None, **options: Any) -> Any:
    """Return a timm model with its published weights, fetched on first use.

    Args:
        name: Name of the timm model.
        create: `create_backbone` (default) or `create_encoder`, which takes ViTs only.
        **options: What that takes.

    Raises:
        UsageError: There is no such model, it has no published weights or they cannot be fetched.
    """
    from patchloom.encoders import create_backbone

    if timm.is_model(name) and not timm.models.is_model_pretrained(name):
        raise UsageError(f"{name} has no published weights; give the path of a bundle or run")
    try:
        with fetching():
            return (create or create_backbone)(name, pretrained=True, **options)
    except UsageError:
        raise
    except (OSError, RuntimeError, ValueError) as error:  # no network, no such file, or a file of another model
        raise UsageError(
            f"the weights of {name} could not be fetched ({reason(error)}); give the path of a bundle or run"
        ) from error


def find_bundle(path: str | Path) -> Path:
    """Return the bundle folder meant by the path of a bundle or of a run.

    Raises:
        UsageError: Neither.
    """
    folder = Path(path)
    for candidate in (folder, folder / "model"):
        if (candidate / CONFIG).exists() and (candidate / WEIGHTS).exists():
            return candidate
    if any((candidate / "adapter.safetensors").exists() for candidate in (folder, folder / "model")):
        raise UsageError(f"{path} holds an adapter and no bundle; where it can be merged, patchloom merge makes one")
    if any((candidate / "ear.json").exists() for candidate in (folder, folder / "model")):
        raise UsageError(f"{path} holds a detector of defects and no bundle; patchloom anomaly predict opens it")
    for candidate in (folder, folder / "model"):
        for name, what in (("vim.json", "makes images"), ("tokenizer.json", "makes tokens")):
            if (candidate / name).exists():
                raise UsageError(f"{path} holds a model that {what}, and no encoder; patchloom.load opens it")
    what = "does not exist" if not folder.exists() else f"holds no {CONFIG} and {WEIGHTS}"
    raise UsageError(f"there is no bundle at {path}: it {what}; give a run folder or its model/")


def _holds_bundle(path: str | Path) -> bool:
    folder = Path(path)
    return any((candidate / CONFIG).exists() for candidate in (folder, folder / "model"))


def read_lineage(path: str | Path) -> dict[str, Any]:
    """Return what made the model of a bundle or run; empty for a bundle of another maker."""
    lineage: dict[str, Any] = _about(find_bundle(path)).get("lineage", {})
    return lineage


def read_reading(path: str | Path) -> dict[str, Any]:
    """Return the options the training images of a bundle or run were read by; empty where it does not say."""
    for folder in (Path(path), Path(path) / "model"):
        if (folder / LINEAGE).exists():
            reading: dict[str, Any] = _about(folder).get("reading") or {}
            return reading
    return {}


def bundle_channels(path: str | Path) -> int | None:
    """Return the number of channels the model of a bundle or run takes; None where there is none."""
    for folder in (Path(path), Path(path) / "model"):
        if (folder / CONFIG).exists():
            config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
            return int(config.get("model_args", {}).get("in_chans", 3))
    return None


def bundle_fingerprint(path: str | Path) -> str:
    """Return a short hash of a bundle's weights."""
    digest = hashlib.sha256()
    with (find_bundle(path) / WEIGHTS).open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()[:16]


def _about(folder: Path) -> dict[str, Any]:
    """Return the contents of `patchloom.json`; empty where another maker wrote none."""
    file = folder / LINEAGE
    if not file.exists():
        return {}
    try:
        about: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{file} is damaged ({error}); delete it to open the bundle without its lineage") from error
    return about


def _build(architecture: str, num_classes: int, arguments: dict[str, Any], folder: Path) -> Any:
    if not timm.is_model(architecture):
        raise UsageError(f"the bundle in {folder} is a {architecture}, which timm {timm.__version__} does not know")
    try:
        model = timm.create_model(architecture, pretrained=False, num_classes=num_classes, **arguments)
    except (TypeError, RuntimeError, AssertionError) as error:
        raise UsageError(f"the bundle in {folder} asks for a {architecture} that cannot be built: {error}") from error
    return model


def check_rebuilds(encoder: Any) -> None:
    """Refuse a module that a bundle could not give back, before time is spent on it.

    Raises:
        UsageError: Says what would be missing.
    """
    _check_rebuilds(timm_config(encoder), dict(encoder.state_dict()))


def _check_rebuilds(config: dict[str, Any], state: dict[str, torch.Tensor]) -> None:
    """Refuse a module whose description would not give it back, before anything is written."""
    architecture, arguments = config["architecture"], config["model_args"]
    try:
        json.dumps(arguments)
    except TypeError as error:
        raise UsageError(f"an argument {architecture} was made with cannot be stored in a bundle: {error}") from error
    arguments = {name: tuple(value) if isinstance(value, list) else value for name, value in arguments.items()}
    with torch.device("meta"):  # shapes only: no memory, no random numbers
        rebuilt = timm.create_model(architecture, pretrained=False, num_classes=config["num_classes"], **arguments)
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    _check_tensors(shapes, rebuilt, "the encoder was changed after it was made, so a bundle could not give it back: it")


def _check_tensors(shapes: dict[str, tuple[int, ...]], model: nn.Module, what: str) -> None:
    own_shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    if shapes == own_shapes:
        return
    right = sum(own_shapes.get(name) == shape for name, shape in shapes.items())
    missing = [name for name in own_shapes if name not in shapes]
    extra = [name for name in shapes if name not in own_shapes]
    other = [f"{n} {shapes[n]} for {own_shapes[n]}" for n in own_shapes if n in shapes and shapes[n] != own_shapes[n]]
    listed = "; ".join(
        f"{kind}: {', '.join(names[:3])}{' …' if len(names) > 3 else ''}"
        for kind, names in (("missing", missing), ("left over", extra), ("of another shape", other))
        if names
    )
    raise UsageError(f"{what} has {right} of the {len(own_shapes)} tensors of its architecture; {listed}")


def _put_in_place(temporary: Path, target: Path) -> None:
    """Rename a finished folder to its place; what was there is kept until the new one stands."""
    if not target.exists():
        temporary.replace(target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
    target.replace(old / "bundle")
    try:
        temporary.replace(target)
    except BaseException:
        (old / "bundle").replace(target)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def _write(path: Path, values: dict[str, Any]) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(values, file, indent=2, default=str)
        file.flush()
        os.fsync(file.fileno())
