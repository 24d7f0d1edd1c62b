"""The published layout of GCAB: a ConViT, the class-attention block, and what each task has (arXiv 2211.12292)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from patchloom.encoders import create_encoder
from patchloom.errors import UsageError
from patchloom.models.published import fill, require
from patchloom.models.published_settings import Hidden, Settings
from patchloom.systems.gcab.drift import DriftProjector
from patchloom.systems.gcab.gates import LARGEST, STEEPEST
from patchloom.systems.gcab.model import GCAB

SETTINGS = Settings(
    obeyed=("num_heads", "steepest", "largest", "drop_path"),
    idle=(
        *("model", "drop", "local_up_to_layer", "locality_strength", "class_order", "initial_increment", "increment"),
        *("lambda_gate", "lambda_drift", "base_epochs", "options", "name", "log_path", "log_category", "sep_memory"),
        *("auto_kd", "kd", "distillation_tau", "memory_size", "fixed_memory", "finetuning", "head_div", "bce_loss"),
        *("freeze_task", "freeze_ft", "freeze_eval", "dytox", "ind_clf", "joint_tokens", "resnet", "incremental_lr"),
        *("incremental_batch_size", "incremental_warmup_lr", "validation", "oversample", "norm", "ft_no_sampling"),
    ),
    other_names={
        "smax": "steepest",
        "s_max": "steepest",
        "thres_emb": "largest",
        "clamp": "largest",
        "input_size": "img_size",
        "num_tasks": "tasks",
        "task": "tasks",
    },
)
PARTS = {
    "patch_embed.": "trunk.encoder.patch_embed.",
    "pos_embed": "trunk.encoder.pos_embed",
    "sabs.": "trunk.encoder.blocks.",
    "tabs.0.": "block.",
    "head.": "heads.",
    "embs_0.": "gates.width.",
    "embs_2.": "gates.hidden.",
}


def load(state: Mapping[str, Tensor], **config: Any) -> nn.Module:
    """Return a `GCAB` with the state of one task of the published code in it.

    Args:
        state: Tensors named `sabs.…`, `tabs.0.…`, `class_tokens.…`, `embs_0.weight` and so on.
        **config: `num_heads` (checked), `s_max` (800), `clamp` (6), `drop_path`. What shapes tell may be given and has
            to agree.

    Returns:
        A module that gives the logits (B, classes of all tasks) for normalised images (B, 3, H, W), in eval mode with
        every projector in its place.

    Raises:
        UsageError: Unknown setting, or tensors missing or left over.
    """
    state = dict(state)
    first = "sabs.0."
    require(
        state, "patch_embed.proj.weight", "pos_embed", "embs_0.weight", "embs_2.weight", f"{first}attn.gating_param",
        "class_tokens.0", "tabs.0.mlp.fc1.weight",
    )  # fmt: skip
    state.pop("task_tokens.0", None)  # left behind by the code it grew from: the first class token once more
    width, channels, patch, _ = state["patch_embed.proj.weight"].shape
    tokens = state["pos_embed"].shape[1]
    side = round(tokens**0.5) * patch
    if (side // patch) ** 2 != tokens:
        raise UsageError(f"pos_embed has {tokens} positions, which are no square; the published models have one")
    blocks = _count(state, "sabs")
    heads = len(state[f"{first}attn.gating_param"])
    tasks, hidden = len(state["embs_0.weight"]), state["embs_2.weight"].shape[1]
    middle = Hidden(width, hidden)
    settled = SETTINGS.settle(
        config,
        {
            "embed_dim": width,
            "depth": blocks if config.get("depth") == blocks else blocks + 1,  # the class-attention block counts
            "patch_size": patch,
            "in_chans": channels,
            "img_size": side,
            "tasks": tasks,
            "mlp_ratio": middle,
            "num_heads": heads,
        },
    )
    encoder = create_encoder(
        "gcab_convit_small_patch4_32",
        image_size=side,
        in_chans=channels,
        patch_size=patch,
        embed_dim=width,
        depth=blocks,
        num_heads=heads,
        mlp_ratio=middle.ratio,
        drop_path=float(settled.get("drop_path", 0.0)),
    )
    model = GCAB(
        encoder,
        tasks,
        num_heads=heads,
        blocks=blocks,
        mlp_ratio=middle.ratio,
        steepest=float(settled.get("steepest", STEEPEST)),
        largest=float(settled.get("largest", LARGEST)),
        compensate=False,  # projectors come from the file; a copy of the encoder is for training
    )
    for task in range(_count(state, "class_tokens")):
        require(state, f"head.{task}.head.weight")
        model.add_task(len(state[f"head.{task}.head.weight"]))
    projectors = _count(state, "projectors")
    if projectors != model.task:
        raise UsageError(
            f"{projectors} projectors for {model.task + 1} tasks; there is one between each task and the next"
        )
    model.projectors.extend(DriftProjector(width, tokens) for _ in range(projectors))
    model.compensates = True
    absent = [name for name in model.state_dict() if name.startswith("trunk.encoder.norm.")]
    fill(model, {_ours(name): value for name, value in state.items()}, may_lack=absent, published=_theirs)
    model.trunk.encoder.norm = nn.Identity()  # the published trunk ends with its last block
    return model


def _count(state: Mapping[str, Tensor], part: str) -> int:
    """Return how many numbered members a part has."""
    numbers = {int(match[1]) for name in state if (match := re.match(rf"{part}\.(\d+)(\.|$)", name))}
    return 1 + max(numbers, default=-1)


def _ours(name: str) -> str:
    return next((ours + name.removeprefix(theirs) for theirs, ours in PARTS.items() if name.startswith(theirs)), name)


def _theirs(name: str) -> str:
    return next((theirs + name.removeprefix(ours) for theirs, ours in PARTS.items() if name.startswith(ours)), name)
