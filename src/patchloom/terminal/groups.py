"""Options in groups, so that a help page of a hundred of them can be read from the top and left early.

A name means the same in every command, so one table serves all. What is not in it belongs to the method itself; the
settings class names in `ABLATIONS` those that a paper varied and its users leave alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields

from patchloom.base.source_options import SourceOptions

NEEDED = "What you need"
OWN = "The method's own"
ABLATIONS = "For ablations"

GROUPS: dict[str, tuple[str, ...]] = {
    NEEDED: (
        "data",
        "train",
        "test",
        "model",
        "images",
        "teacher",
        "encoder",
        "out",
        "preset",
        "config",
        "help",
    ),
    "Data": (
        "image_size",
        "patch_size",
        "spacing",
        "crops",
        "channel_mean",
        "channel_std",
        "in_chans",
        *(field.name for field in fields(SourceOptions)),
        "view",
        "foreground",
        "foreground_share",
        "ignore_label",
        "mask_values",
        "val",
        "val_fraction",
        "groups",
        "label_fraction",
        "shots",
        "shots_by",
        "patients",
        "imbalance",
        "imbalance_kind",
        "task",
        "limit",
        "class_name",
        "probe_data",
        "captions",
        "templates",
        "masks",
        "good",
        "test_share",
        "val_data",
        "calibration_share",
        "teacher_image_size",
        "untrained",
        "pool",
    ),
    "Recipe": (
        "epochs",
        "max_steps",
        "steps",
        "batch_size",
        "accumulate",
        "optimizer",
        "momentum",
        "lr",
        "lr_base_batch",
        "lr_drops",
        "lr_drop",
        "min_lr",
        "warmup_epochs",
        "warmup",
        "weight_decay",
        "weight_decay_end",
        "betas",
        "eps",
        "clip_grad",
        "layer_decay",
        "drop_path",
        "label_smoothing",
        "class_weights",
        "reweight_from",
        "logit_adjustment",
        "ordinal_distance",
        "mixup",
        "cutmix",
        "switch_prob",
        "auto_augment",
        "color_jitter",
        "erasing",
        "flip",
        "crop_scale",
        "crop_padding",
        "rotate",
        "jitter",
        "jitter_prob",
        "repeated_augmentation",
        "init_scale",
        "init_from",
        "ema",
        "experts",
        "expert_layers",
        "share_rate",
        "share_schedule",
        "adversary",
        "adversary_mix",
        "adversary_eps",
        "adversary_steps",
        "adversary_encoder",
        "sam_rho",
        "sam_rho_late",
        "seed",
    ),
    "Hardware": (
        "accelerator",
        "device",
        "devices",
        "nodes",
        "strategy",
        "precision",
        "num_workers",
        "compile",
        "grad_checkpointing",
    ),
    "The run and what it leaves behind": (
        "resume",
        "overwrite",
        "checkpoint_every",
        "probe_every",
        "health_every",
        "log_every",
        "draws",
        "resample",
        "cache",
        "predictions",
        "report",
        "shown_channels",
    ),
}
"""Titles and the options under them, in the order in which a help page shows them."""


def grouped(names: Iterable[str], required: Iterable[str], ablations: Iterable[str] = ()) -> dict[str, list[str]]:
    """Return the options of a command by the title they stand under; empty groups are left out.

    >>> grouped(["k", "lr", "out", "target"], required=["out"], ablations=["target"])
    {'What you need': ['out'], 'Recipe': ['lr'], "The method's own": ['k'], 'For ablations': ['target']}
    """
    left = list(names)
    groups: dict[str, list[str]] = {NEEDED: [name for name in left if name in set(required)]}
    last = [name for name in left if name in set(ablations)]
    left = [name for name in left if name not in groups[NEEDED] and name not in last]
    for title, members in GROUPS.items():
        groups.setdefault(title, []).extend(name for name in members if name in left)
    known = {name for members in GROUPS.values() for name in members}
    groups[OWN] = [name for name in left if name not in known]
    groups[ABLATIONS] = last
    return {title: members for title, members in groups.items() if members}
