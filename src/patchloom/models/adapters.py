"""Adapters on disk: one small safetensors file that names the encoder it extends by its hash.

>>> import patchloom as pl
>>> model = pl.load("runs/base/model", adapters=["runs/birds", "runs/cars"])  # doctest: +SKIP
>>> activate(model, "cars")  # doctest: +SKIP
>>> model(images)  # logits of the cars  # doctest: +SKIP

A run of `patchloom adapt` with a frozen encoder leaves such a file in `model/`; `pl.load` of that run finds the encoder
again and puts the adapter in.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from patchloom.base.version import __version__
from patchloom.encoders import Encoder, create_encoder, depth, embed_dim, in_chans, input_size, kind_of, set_image_size
from patchloom.encoders.insertion import Insertion, activate, active, insert, insertions, merge, plain, remove, serve
from patchloom.encoders.patches import one_side
from patchloom.errors import UsageError, unknown_name
from patchloom.io import write_json, written_whole

__all__ = [
    "activate",
    "active",
    "add_adapters",
    "encoder_hash",
    "insert",
    "insertions",
    "merge",
    "read_adapter",
    "remove",
    "save_adapter",
    "serve",
]

ADAPTER, LINEAGE = "adapter.safetensors", "patchloom.json"
# Where the class of each kind of adapter lives; loaded when a file asks for it.
KINDS = {
    "adaptformer": "patchloom.systems.adaptformer.method:AdaptFormer",
    "bitfit": "patchloom.systems.bitfit.method:BitFit",
    "dvpt": "patchloom.systems.dvpt.method:DVPT",
    "linear": "patchloom.systems.linear.method:LinearHead",
    "lora": "patchloom.systems.lora.method:LoRA",
    "prompt_cam": "patchloom.systems.prompt_cam.model:ClassPrompts",
    "vpt": "patchloom.systems.vpt.method:VisualPrompts",
}


def encoder_hash(encoder: Encoder) -> str:
    """Return a short hash of an encoder's weights: names, shapes, types and bytes, without head and adapters.

    The image size counts, as far as position tables have its shape.
    """
    digest = hashlib.sha256()
    with plain(encoder):
        for name, value in sorted(encoder.state_dict().items()):
            if name.startswith(("head.", "adapters.")):
                continue
            tensor = value.detach().cpu().contiguous()
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
            digest.update(tensor.view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def save_adapter(
    encoder: Encoder,
    path: str | Path,
    *,
    name: str | None = None,
    base: str | None = None,
    encoder_path: str | None = None,
    class_names: Sequence[str] | None = None,
    lineage: dict[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write one of an encoder's adapters; the file appears whole or not at all.

    Args:
        encoder: With the adapter in it.
        path: File (`….safetensors`), or folder to write `adapter.safetensors` to.
        name: Which adapter; default: the active one.
        base: Hash of the encoder as it was loaded; default: as it is.
        encoder_path: Bundle, run or timm model that the encoder came from.
        class_names: Names of the outputs.
        lineage: What made the adapter.
        overwrite: Replace a file that is there.

    Returns:
        The file.

    Raises:
        UsageError: There is no such adapter, or the file exists and is not to be replaced.
    """
    chosen = active(encoder) if name is None else name
    attached = insertions(encoder)
    if chosen is None or chosen not in attached:
        raise unknown_name("adapter", str(chosen), attached)
    insertion: Any = attached[chosen]
    target = Path(path)
    file = target if target.suffix == ".safetensors" else target / ADAPTER
    if file.exists() and not overwrite:
        raise UsageError(f"{file} exists; choose another path, or set overwrite to replace it")
    about = {
        "kind": insertion.kind,
        "arguments": insertion.arguments,
        "class_names": None if class_names is None else list(class_names),
        "encoder_hash": base or encoder_hash(encoder),
        "encoder": encoder_path,
        "width": embed_dim(encoder),
        "depth": depth(encoder),
        "image_size": list(input_size(encoder)),
        "in_chans": in_chans(encoder),
        **({"reading": encoder.pretrained_cfg["reading"]} if encoder.pretrained_cfg.get("reading") else {}),
        "mean": list(encoder.pretrained_cfg["mean"]),
        "std": list(encoder.pretrained_cfg["std"]),
        "versions": {"patchloom": __version__, "torch": torch.__version__, "timm": timm.__version__},
    }
    if encoder_path is not None and Path(encoder_path).exists():
        about["encoder_from_here"] = os.path.relpath(encoder_path, file.parent)
    state = {key: value.detach().cpu().contiguous() for key, value in insertion.stored_state().items()}
    with written_whole(file) as temporary:
        save_file(state, temporary, metadata={"format": "pt", "patchloom": json.dumps(about)})
        temporary.chmod(0o644)
    if lineage is not None and file.name == ADAPTER:
        write_json(file.with_name(LINEAGE), {"lineage": lineage, "versions": about["versions"]}, default=str)
    return file


def find_adapter(path: str | Path) -> Path | None:
    """Return the adapter file meant by the path of a file, of its folder or of a run; None where there is none."""
    place = Path(path)
    if place.is_file() and place.suffix == ".safetensors":
        return place
    return next((file for file in (place / ADAPTER, place / "model" / ADAPTER) if file.is_file()), None)


def read_adapter(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return what an adapter file says of itself, and its tensors.

    Raises:
        UsageError: There is none, or it is damaged or no adapter.
    """
    file = find_adapter(path)
    if file is None:
        raise UsageError(f"there is no adapter at {path}; give a run, its model/, or an adapter.safetensors")
    try:
        with safe_open(file, framework="pt") as handle:
            about = json.loads((handle.metadata() or {}).get("patchloom", "null"))
        state = load_file(file)
    except (SafetensorError, ValueError, OSError) as error:
        raise UsageError(f"the adapter {file} is damaged ({' '.join(str(error).split())[:100]})") from error
    if not isinstance(about, dict) or "kind" not in about:
        raise UsageError(f"{file} is no adapter of Patchloom: its header does not say what it extends")
    return about, state


def add_adapters(encoder: Encoder, adapters: Sequence[str | Path] | Mapping[str, str | Path]) -> Encoder:
    """Put adapters from files into the encoder they were made for; the first acts.

    Args:
        encoder: As its bundle has it.
        adapters: Files or runs; their names are those of the runs or files, or the keys of a mapping.

    Raises:
        UsageError: An adapter for another encoder, width, depth or image size, or the same name twice.
    """
    named = adapters if isinstance(adapters, Mapping) else _named(adapters)
    # Taking the size of an adapter changes position tables; what the encoder was before is kept with it.
    own_hash = getattr(encoder, "hash_before_resize", None) or encoder_hash(encoder)
    first = active(encoder)
    for name, path in named.items():
        about, state = read_adapter(path)
        _check_fits(about, path, encoder, own_hash)
        _take_inputs(encoder, own_hash, about, path)
        with plain(encoder):
            insertion = _built(about, encoder)
        _fill(insertion, state, path)
        insertion.class_names = about["class_names"]
        insert(encoder, insertion, name, activate_it=False)
        first = first or name
    activate(encoder, first)
    return encoder


def load_adapted(path: str | Path) -> Encoder:
    """Return the encoder that the adapter of a run extends, with the adapter in it, in eval mode.

    Raises:
        UsageError: The encoder is not where it was, or is another one now.
    """
    about, _ = read_adapter(path)
    encoder = _find_encoder(about, path)
    add_adapters(encoder, {"adapter": path})
    if about["class_names"]:
        encoder.pretrained_cfg = {**encoder.pretrained_cfg, "label_names": about["class_names"]}
    if about.get("reading"):
        encoder.pretrained_cfg = {**encoder.pretrained_cfg, "reading": about["reading"]}
    return encoder.eval()


def load_into(insertion: Insertion, path: str | Path, *, base: str, classes: int) -> None:
    """Fill a fresh insertion with an adapter file of the same method, encoder and number of classes.

    Raises:
        UsageError: One of them differs; names both.
    """
    about, state = read_adapter(path)
    mine: Any = insertion
    if about["kind"] != mine.kind:
        raise UsageError(f"{path} is an adapter of {about['kind']}, not of {mine.kind}")
    if about["encoder_hash"] != base:
        raise UsageError(f"{path} was made for the encoder {about['encoder_hash']}, and this one is {base}")
    theirs = about["arguments"].get("num_classes")
    if theirs != classes:
        raise UsageError(f"{path} tells {theirs} classes apart, and there are {classes} here; start without it")
    _fill(insertion, state, path)


def _named(paths: Sequence[str | Path]) -> dict[str, str | Path]:
    """Return adapters by name: of the run, or of the file where it has a name of its own."""
    named: dict[str, str | Path] = {}
    for path in paths:
        place = Path(path)
        parts = [part for part in (*place.parts[:-1], place.stem) if part not in ("model", "adapter", "/", ".")]
        name = (parts[-1] if parts else "adapter").replace(".", "_")
        if name in named:
            raise UsageError(f"two adapters are called {name!r}: {named[name]} and {path}; give a mapping with names")
        named[name] = path
    return named


def _check_fits(about: dict[str, Any], path: str | Path, encoder: Encoder, own_hash: str) -> None:
    for word, mine in (("width", embed_dim(encoder)), ("depth", depth(encoder))):
        if about[word] != mine:
            raise UsageError(f"the adapter {path} is for encoders of {word} {about[word]}, and this one has {mine}")
    if about["encoder_hash"] != own_hash:
        came_from = f" (from {about['encoder']})" if about.get("encoder") else ""
        raise UsageError(
            f"the adapter {path} was made for the encoder {about['encoder_hash']}{came_from}, and this one is "
            f"{own_hash}: same shape, other weights"
        )


def _take_inputs(encoder: Encoder, own_hash: str, about: dict[str, Any], path: str | Path) -> None:
    """Set the encoder up for the images an adapter was trained on: their size, and what they are normalised by."""
    size = tuple(int(side) for side in about["image_size"])
    statistics = {name: tuple(about[name]) for name in ("mean", "std")}
    alone = not insertions(encoder)
    if size != input_size(encoder):
        if not alone:
            raise UsageError(
                f"the adapter {path} was trained on {kind_of(encoder)}s of {one_side(size)} pixels and the others "
                f"here on {one_side(input_size(encoder))}; load it on an encoder of its own"
            )
        cast(Any, encoder).hash_before_resize = own_hash
        set_image_size(encoder, size)
    if any(tuple(encoder.pretrained_cfg[name]) != value for name, value in statistics.items()):
        if not alone:
            raise UsageError(
                f"the adapter {path} was trained on images normalised in another way than those of the others here; "
                f"load it on an encoder of its own"
            )
        encoder.pretrained_cfg = {**encoder.pretrained_cfg, **statistics}


def _built(about: dict[str, Any], encoder: Encoder) -> Any:
    if about["kind"] not in KINDS:
        raise unknown_name("kind of adapter", about["kind"], KINDS)
    module, _, name = KINDS[about["kind"]].partition(":")
    with torch.random.fork_rng(devices=[]):  # initial values are overwritten; the caller's random state stays
        return getattr(importlib.import_module(module), name)(encoder, **about["arguments"])


def _fill(insertion: Insertion, state: dict[str, Tensor], path: str | Path) -> None:
    state_dict = insertion.stored_state()
    wrong = [name for name in state_dict if name not in state or state[name].shape != state_dict[name].shape]
    wrong += [name for name in state if name not in state_dict]
    if wrong:
        fits = len(state_dict) - sum(name in state_dict for name in wrong)
        raise UsageError(f"the adapter {path} fits {fits} of {len(state_dict)} tensors; not {', '.join(wrong[:3])}")
    insertion.load_stored_state(state)


def _find_encoder(about: dict[str, Any], path: str | Path) -> Encoder:
    from patchloom.models.bundle import fetch_encoder, load, open_encoder
    from patchloom.models.start import start_encoder

    file = find_adapter(path)
    assert file is not None
    named = about.get("encoder")
    beside, channels = about.get("encoder_from_here"), about.get("in_chans")
    for candidate in (file.parent / beside if beside else None, Path(named) if named else None):
        if candidate is not None and candidate.exists():
            encoder = load(candidate)
            if channels is None or in_chans(encoder) == channels:
                return encoder
            return start_encoder(str(candidate), in_chans=channels)  # adapted to them, as it was in training
    if named and timm.is_model(named):
        if channels is None or channels == 3:
            return open_encoder(named)
        return fetch_encoder(named, create_encoder, in_chans=channels)
    raise UsageError(
        f"the adapter {path} extends the encoder {about['encoder_hash']}, which is no longer at {named}; open it with "
        f"patchloom.load(BUNDLE, adapters=[…])"
    )
