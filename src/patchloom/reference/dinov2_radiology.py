"""Published decoders of the DINOv2 radiology benchmark (specification `dinov2_radiology`, section 4).

A checkpoint holds one decoder per learning rate tried, as `decoders_dict.<type>:lr=….`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from patchloom.errors import UsageError, unknown_name
from patchloom.reference.state import agree, check_settings, fill
from patchloom.segment.radiology import LinearSegHead, UNetSegHead

KNOWN = ("name", "patch_size", "embed_dim", "num_classes", "final_relu")


def load(state: Mapping[str, Tensor], **config: Any) -> nn.Module:
    """Return a decoder, or all of them by name.

    Args:
        state: Tensors of one decoder (`decoder.*`, or `up1.*` to `up4.*`), or of several under `decoders_dict.`.
        **config: `name` of the one wanted; `patch_size` (14); `final_relu` (True: as released).

    Returns:
        The decoder, taking tokens and their grid; where there are several and none is named, an `nn.ModuleDict`.

    Raises:
        UsageError: No such decoder, unknown settings, or tensors missing or left over.
    """
    check_settings(config, KNOWN)
    marker = "decoders_dict."
    if not any(marker in name for name in state):
        return _decoder(state, config)
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        if marker not in name:
            raise UsageError(f"unexpected: {name}; a decoder's tensors stand under {marker}")
        # Names of decoders hold no dots: those of the learning rate are written as underscores.
        decoder, _, rest = name.partition(marker)[2].partition(".")
        found.setdefault(decoder, {})[rest.removeprefix("module.").removeprefix("model.")] = tensor
    wanted = config.get("name")
    if wanted is not None:
        if wanted not in found:
            raise unknown_name("decoder", str(wanted), found)
        return _decoder(found[wanted], config)
    made = {name: _decoder(tensors, config) for name, tensors in found.items()}
    return next(iter(made.values())) if len(made) == 1 else nn.ModuleDict(made)


def _decoder(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> nn.Module:
    if "decoder.weight" in state:
        classes, width = state["decoder.weight"].shape[:2]
        told = {"embed_dim": width, "num_classes": classes}
    elif "up1.upconv.weight" in state and "up4.upconv.weight" in state:
        told = {"embed_dim": len(state["up1.upconv.weight"]), "num_classes": state["up4.upconv.weight"].shape[1]}
    else:
        raise UsageError(f"the checkpoint has no tensor of a known decoder; it has {', '.join(list(state)[:4])}")
    agree(config, told)
    patch = int(config.get("patch_size", 14))
    if "decoder.weight" in state:
        return fill(LinearSegHead(**told, patch_size=patch), state).eval()
    module = UNetSegHead(**told, patch_size=patch, final_relu=bool(config.get("final_relu", True)))
    counters = [name for name in module.state_dict() if name.endswith("num_batches_tracked")]
    return fill(module, state, may_lack=counters).eval()
