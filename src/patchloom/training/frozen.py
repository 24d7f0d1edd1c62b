"""Frozen models of a run, such as teachers, that its checkpoints need not hold: they are opened again where they lie.

A checkpoint keeps their hash, so that a run is not gone on with under another teacher than it began with.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from patchloom.errors import UsageError


def leave_out(checkpoint: dict[str, Any], prefix: str, module: nn.Module) -> None:
    """Take a frozen module's tensors out of a checkpoint and note their hash.

    Args:
        checkpoint: What is about to be written.
        prefix: The module's name within the method, such as `model.teacher`.
        module: The module.
    """
    state = checkpoint["state_dict"]
    for name in [name for name in state if name.startswith(f"{prefix}.")]:
        del state[name]
    checkpoint.setdefault("frozen", {})[prefix] = _hash_of(module)


def put_back(checkpoint: dict[str, Any], prefix: str, module: nn.Module, where: str) -> None:
    """Fill a checkpoint that was read with the tensors of the module opened anew.

    Raises:
        UsageError: They are other tensors than those the run began with.
    """
    if checkpoint["frozen"][prefix] != _hash_of(module):
        raise UsageError(f"{where} is another model than the one this run began with; start a new run, or restore it")
    checkpoint["state_dict"] |= {f"{prefix}.{name}": value for name, value in module.state_dict().items()}


def _hash_of(module: nn.Module) -> str:
    """Return the module's hash, made once: it is frozen."""
    from patchloom.features.fingerprint import state_hash

    if "_frozen_hash" not in module.__dict__:
        module.__dict__["_frozen_hash"] = state_hash(module)
    return str(module.__dict__["_frozen_hash"])
