"""Published linear probes and decoders of the DINOv2 radiology benchmark, and DINOv2's own linear probes.

Baharoon et al. 2023, arXiv 2312.02366; github.com/MohammedSB/DINOv2ForRadiology. A checkpoint holds one probe for each
choice of blocks, pooling and learning rate (`classifiers_dict.<name>.linear.…`), or one decoder for each learning rate
(`decoders_dict.<name>.…`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from patchloom.encoders.probe import LinearProbe, LinearProbes
from patchloom.errors import UsageError, unknown_name
from patchloom.models.published import bare, fill, has, wrapper_of
from patchloom.models.published_settings import Settings, agree
from patchloom.segment.radiology import LinearSegHead, UNetSegHead

CLASSIFIERS, DECODERS = "classifiers_dict.", "decoders_dict."
# What tensors tell (`embed_dim`, `num_classes`, `out_dim`) is checked probe by probe, decoder by decoder.
IDLE = (
    *("learning_rate", "learning_rates", "lr_list", "val_epochs", "epoch_length", "n_last_blocks_list", "fine_tune"),
    *("train_dataset_str", "val_dataset_str", "test_dataset_str", "pretrained_weights", "config_file", "backbone"),
    *("decoder_type", "linear_head_type", "segmentation", "loss_function", "shots", "is_3d", "peft", "n_gpus"),
)
SPELLINGS = {"classifier": "name", "use_n_blocks": "blocks", "use_avgpool": "avgpool", "in_channels": "embed_dim"}
OF_PROBES = Settings(
    obeyed=("name", "blocks", "avgpool", "embed_dim", "num_classes", "out_dim"),
    idle=(*IDLE, "patch_size", "image_size"),
    other_names=SPELLINGS,
)
OF_DECODERS = Settings(
    obeyed=("name", "patch_size", "embed_dim", "num_classes", "final_relu"),
    idle=(*IDLE, "image_size"),
    other_names=SPELLINGS,
)
# classifier_4_blocks_avgpool_True_lr_0_00100 of DINOv2, linear:blocks=4:avgpool=True:lr=0_0010000000 of the benchmark.
TOLD_BY_NAME = re.compile(r"(\d+)(?:_blocks_|:)avgpool[_=](True|False)")
# What stands between a probe's name and its tensors: a probe of volumes wraps one of slices.
OF_VOLUMES = "model."


def load(state: Mapping[str, Tensor], **config: Any) -> nn.Module:
    """Return a linear probe or a decoder, or all of them by name.

    Args:
        state: Tensors of several probes under `classifiers_dict.` or of one (`linear.weight`, `linear.bias`); or of
            several decoders under `decoders_dict.` or of one (`decoder.*`, or `up1.*` to `up4.*`).
        **config: `name` (or `classifier`) of the one wanted. Of probes, `blocks` and `avgpool` where the name does not
            tell them; of decoders, `patch_size` (14) and `final_relu` (True: as released). `num_classes` and
            `embed_dim` may be given and have to agree.

    Returns:
        A `LinearProbe`, or where there are several and none is named `LinearProbes`; a decoder, taking tokens and their
        grid, or an `nn.ModuleDict`.

    Raises:
        UsageError: No such probe or decoder, unknown settings, or tensors missing or left over.
    """
    make: Callable[[Mapping[str, Tensor], Mapping[str, Any], str], nn.Module]
    container: type[nn.ModuleDict]
    if any(CLASSIFIERS in name or bare(name) == "linear.weight" for name in state):
        known, marker, kind, make, container = OF_PROBES, CLASSIFIERS, "probe", _probe, LinearProbes
    else:
        known, marker, kind, make, container = OF_DECODERS, DECODERS, "decoder", _decoder, nn.ModuleDict
    config = known.settle(config, {})
    if not any(marker in name for name in state):
        return make(state, config, "")
    tensors_by_name: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        if not name.startswith(marker):
            raise UsageError(f"unexpected: {name}; a {kind}'s tensors stand under {marker}")
        # Names of members hold no dots: those of the learning rate are written as underscores.
        member, _, rest = name.removeprefix(marker).partition(".")
        tensors_by_name.setdefault(member, {})[rest] = tensor
    chosen = config.get("name")
    if chosen is not None:
        chosen = str(chosen).replace(".", "_")
        if chosen not in tensors_by_name:
            raise unknown_name(kind, chosen, tensors_by_name)
        tensors_by_name = {chosen: tensors_by_name[chosen]}
    modules = {name: make(tensors, config, f"{marker}{name}.") for name, tensors in tensors_by_name.items()}
    if len(modules) == 1:
        return next(iter(modules.values()))
    _check_widths({name: one for name, one in modules.items() if isinstance(one, LinearProbe)})
    return container(modules)


def _probe(state: Mapping[str, Tensor], config: Mapping[str, Any], title: str) -> LinearProbe:
    """Return a probe of tensors that stand under `title` in the file."""
    wrapper = wrapper_of(name for name in state if bare(name).startswith("linear."))
    needed = [f"{wrapper}linear.weight", f"{wrapper}linear.bias"]
    missing = [f"{title}{name}" for name in needed if name not in state]
    unexpected = [f"{title}{name}" for name in state if name not in needed]
    if missing or unexpected:
        listed = (("missing", missing), ("unexpected", unexpected))
        raise UsageError("; ".join(f"{what}: {', '.join(names[:6])}" for what, names in listed if names))
    weight = state[needed[0]]
    if weight.ndim != 2:
        raise UsageError(f"{title}{needed[0]} has shape {tuple(weight.shape)}; a probe's is (classes, columns)")
    classes, columns = weight.shape
    inferred: dict[str, Any] = {"num_classes": classes}
    if (match := TOLD_BY_NAME.search(title)) is not None:
        inferred |= {"blocks": int(match[1]), "avgpool": match[2] == "True"}
    agree(config, inferred)
    blocks, avgpool = (inferred.get(name, config.get(name)) for name in ("blocks", "avgpool"))
    if type(blocks) is not int or blocks < 1 or type(avgpool) is not bool:
        raise UsageError(
            f"blocks is {blocks!r} and avgpool {avgpool!r} for {title}{needed[0]}, whose name does not tell them; give "
            f"how many blocks it reads, at least 1, and True or False"
        )
    width, rest = divmod(columns, blocks + avgpool)
    if rest:
        raise UsageError(
            f"{title}{needed[0]} has {columns} columns, which {blocks} class tokens{' and a mean' * avgpool} do not "
            f"share"
        )
    agree(config, {"embed_dim": width, "out_dim": columns})
    probe = LinearProbe(width, classes, blocks, avgpool, volumes=OF_VOLUMES in wrapper)
    probe.to(torch.promote_types(weight.dtype, torch.float32))
    ours = {name.removeprefix(wrapper): value for name, value in state.items()}
    fill(probe, ours, published=lambda name: f"{title}{wrapper}{name}")
    return probe.eval()


def _check_widths(probes: Mapping[str, LinearProbe]) -> None:
    """Refuse probes whose names cannot all be right: those of a file read the same encoder."""
    widths: dict[int, str] = {}
    for name, probe in probes.items():
        widths.setdefault(probe.embed_dim, name)
    if len(widths) > 1:
        (first, one), (second, other) = list(widths.items())[:2]
        raise UsageError(
            f"by their names and columns, {one} reads an encoder of width {first} and {other} one of width {second}; "
            f"one of the names is wrong"
        )


def _decoder(state: Mapping[str, Tensor], config: Mapping[str, Any], title: str) -> nn.Module:
    """Return a decoder of tensors that stand under `title` in the file."""
    wrapper = wrapper_of(state)
    state = {name.removeprefix(wrapper): value for name, value in state.items()}

    def shape(name: str) -> tuple[int, ...]:
        if name not in state:
            raise UsageError(f"missing: {title}{wrapper}{name}")
        return tuple(state[name].shape)

    linear = has(state, "decoder.")
    if not linear and not has(state, "up1.", "up2.", "up3.", "up4."):
        raise UsageError(
            f"the checkpoint has no tensor of a known decoder or probe; it has {', '.join(list(state)[:4])}"
        )
    if linear:
        classes, width = shape("decoder.weight")[:2]
    else:
        width, classes = shape("up1.upconv.weight")[0], shape("up4.upconv.weight")[1]
    agree(config, {"embed_dim": width, "num_classes": classes})
    patch = int(config.get("patch_size", 14))
    module: nn.Module = (
        LinearSegHead(width, classes, patch)
        if linear
        else UNetSegHead(width, classes, patch, final_relu=bool(config.get("final_relu", True)))
    )
    counters = [name for name in module.state_dict() if name.endswith("num_batches_tracked")]
    return fill(module, state, may_lack=counters, published=lambda name: f"{title}{wrapper}{name}").eval()
