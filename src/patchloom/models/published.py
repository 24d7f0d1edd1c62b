"""Reading published checkpoints: wrappers off, tensors counted, nothing unpickled that could act."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from patchloom.base.stored import read_pickle, read_tensors
from patchloom.errors import UsageError

WRAPPERS = (
    "model",
    "module",
    "state_dict",
    "model_state_dict",
    "trainable_state_dict",
    "model_ema",
    "teacher",
    "student",
    "denoiser",
)
# What training puts before all names of a model: parallel training, torch.compile, DeepSpeed, a LightningModule …
PREFIXES = ("module.", "_orig_mod.", "_forward_module.", "_fsdp_wrapped_module.", "model.")
# … and before those of its parts, where parts are compiled, sharded or recomputed.
OF_PARTS = re.compile(r"(?<![^.])(_orig_mod|_forward_module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def read_state(checkpoint: Mapping[str, Any] | str | Path, meant: Collection[str] = ()) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint by name.

    Args:
        checkpoint: State dict, possibly inside wrapper keys such as `model`; or the path of one (a pickle, read
            with `weights_only=True`, or safetensors), or of the folder of a DeepSpeed checkpoint.
        meant: Of `PREFIXES` those which say something about the model, and stay.

    Raises:
        UsageError: There is no such file, or no tensors in it, or it holds objects that are not plain data.
    """
    state: Any = checkpoint if isinstance(checkpoint, Mapping) else _read(Path(checkpoint))
    while (inner := next((state[key] for key in WRAPPERS if isinstance(state.get(key), Mapping)), None)) is not None:
        state = inner
    tensors = {OF_PARTS.sub("", str(name)): value for name, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        raise UsageError(f"no tensors in the checkpoint (its keys: {', '.join(map(str, list(state)[:8]))})")
    prefix = wrapper_of(tensors, meant)
    return {name.removeprefix(prefix): value for name, value in tensors.items()}


def wrapper_of(names: Iterable[str], meant: Collection[str] = ()) -> str:
    """Return what training put before all names of a model, in whichever nesting: such as `module.model.`."""
    names, prefix = list(names), ""
    known = [each for each in PREFIXES if each not in meant]
    while names and (
        wrapper := next((each for each in known if all(name.startswith(prefix + each) for name in names)), "")
    ):
        prefix += wrapper
    return prefix


def bare(name: str) -> str:
    """Return a tensor's name without the wrappers before it."""
    return name.removeprefix(wrapper_of([name]))


def _read(path: Path) -> Mapping[str, Any]:
    if path.is_dir():  # what DeepSpeed writes: one file of states for each rank of the model
        files = sorted(path.glob("*model_states.pt"))
        if len(files) != 1:
            raise UsageError(f"{path} is a folder with {len(files)} files *model_states.pt; give the checkpoint's file")
        path = files[0]
    if not path.is_file():
        raise UsageError(f"there is no checkpoint file {path}")
    if path.suffix == ".safetensors":
        return read_tensors(path)
    # Published checkpoints carry their command line as a Namespace: plain data, so it may pass.
    state: Mapping[str, Any] = read_pickle(path, plain=[argparse.Namespace])
    if not isinstance(state, Mapping):
        raise UsageError(f"{path} holds a {type(state).__name__}, not a state dict")
    return state


def fill(
    module: nn.Module,
    state: Mapping[str, Tensor],
    *,
    may_lack: Iterable[str] = (),
    published: Callable[[str], str] = str,
) -> nn.Module:
    """Load all of `state` into all of `module`, or refuse.

    Args:
        module: Our module.
        state: Tensors under our names.
        may_lack: Names of the module that the checkpoint need not have.
        published: The name a tensor has in the checkpoint, by our name: messages speak of the file.

    Raises:
        UsageError: Tensors missing, left over or of another shape, by name and count.
    """
    state_dict = module.state_dict()
    missing = [published(name) for name in state_dict if name not in state and name not in set(may_lack)]
    unexpected = [published(name) for name in state if name not in state_dict]
    shapes = [
        f"{published(name)} {tuple(state[name].shape)} instead of {tuple(state_dict[name].shape)}"
        for name in state_dict
        if name in state and state[name].shape != state_dict[name].shape
    ]
    if missing or unexpected or shapes:
        fits = sum(name in state and state[name].shape == state_dict[name].shape for name in state_dict)
        parts = [
            f"{what}: {', '.join(names[:6])}{f' and {len(names) - 6} more' if len(names) > 6 else ''}"
            for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
            if names
        ]
        raise UsageError(f"{fits} of {len(state_dict)} tensors fit; {'; '.join(parts)}")
    module.load_state_dict(dict(state), strict=False)
    return module


def require(state: Mapping[str, Tensor], *names: str) -> None:
    """Refuse a checkpoint that lacks a tensor which its others call for.

    Raises:
        UsageError: Names what is missing.
    """
    missing = [name for name in names if name not in state]
    if missing:
        raise UsageError(f"missing: {', '.join(missing)}")


def has(state: Mapping[str, Tensor], *prefixes: str) -> bool:
    """Return whether a tensor's name begins with one of the prefixes."""
    return any(name.startswith(prefixes) for name in state)
