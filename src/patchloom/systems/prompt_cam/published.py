"""Published Prompt-CAM checkpoints: timm's `VisionTransformer` plus prompts and head (arXiv 2501.09333).

The repository also trains plain visual prompts with a head of all classes, which are told by that head.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from timm.layers import LayerNorm
from torch import Tensor, nn

from patchloom.encoders import Encoder, create_encoder
from patchloom.encoders.insertion import insert
from patchloom.errors import UsageError, unknown_name
from patchloom.models.published import fill, has
from patchloom.models.published_settings import Hidden, Settings, epsilon_of, name_of
from patchloom.systems.prompt_cam.model import NAME, PromptCAM
from patchloom.systems.vpt.model import VisualPrompts

SETTINGS = Settings(
    obeyed=(
        "num_heads",
        "image_size",
        "no_embed_class",
        "act",
        "norm_eps",
        "drop_path",
        "dropout",
        "vpt_layer",
        "global_pool",
    ),
    idle=(
        *("init_values", "dynamic_img_size", "dynamic_img_pad", "weight_init", "drop_rate", "pos_drop_rate", "model"),
        *("patch_drop_rate", "proj_drop_rate", "attn_drop_rate", "embed_layer", "block_fn", "mlp_layer"),
        *("pretrained_weights", "data", "normalized", "optimizer", "lr_min", "warmup_lr_init", "warmup_epoch"),
        *("final_acc_hp", "early_patience", "eval_freq", "store_ckp", "test_batch_size", "full_batch_size", "vis_attn"),
        *("random_seed", "gpu_num", "method_name", "task", "top_traits", "nmbr_samples", "vis_outdir", "checkpoint"),
        *("final_run", "data_split", "test_data", "train_data", "initialize", "params", "root_dir", "vpt"),
    ),
    other_names={
        "img_size": "image_size",
        "crop_size": "image_size",
        "act_layer": "act",
        "layer_norm_eps": "norm_eps",
        "norm_layer": "norm_eps",
        "drop_path_rate": "drop_path",
        "prompt_dropout": "dropout",
        "vpt_dropout": "dropout",
        "class_num": "num_classes",
    },
    read={"norm_eps": epsilon_of, "act": name_of},
)
PROMPTS = "vpt.prompt_embeddings"
PLAIN = "adapter"
"""What plain visual prompts are called on the encoder."""
ENTRY_POINTS = {1e-6: "vit_base_patch16_224", 1e-5: "vit_base_patch16_clip_224"}


def load(state: Mapping[str, Tensor], **config: Any) -> nn.Module:
    """Return our module with a published state dict in it.

    Args:
        state: Tensors under the published names.
        **config: What shapes do not tell: `num_heads` (default: 64 wide each), `act` (`gelu`, or `quick_gelu` for
            CLIP), `norm_eps` (default 1e-6; CLIP 1e-5), `img_size` (a side or (H, W); default: a square from the
            position embedding), `no_embed_class`, `prompt_dropout` and `drop_path` in training (default 0); of plain
            visual prompts `vpt_layer` (how many of the last blocks have some) and `global_pool` (`token` or `avg`,
            where both could be). What they tell (`patch_size`, `embed_dim`, `depth`, …) may be given and has to agree.

    Returns:
        `PromptCAM`; of plain visual prompts, which have a head of all classes, the encoder with `VisualPrompts` on it,
        which gives logits. One set of them is shallow as released: its tokens leave after the first block.

    Raises:
        UsageError: Unknown setting, or tensors missing or left over.
    """
    for name in (PROMPTS, "head.weight", "patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight"):
        if name not in state:
            raise UsageError(f"the checkpoint has no {name}, so it is no Prompt-CAM model")
    inferred = _inferred_from_shapes(state, bool(config.get("vpt_layer")))
    config = SETTINGS.settle(config, inferred)
    if (pool := config.setdefault("global_pool", inferred["global_pool"] or "token")) not in ("avg", "token"):
        raise unknown_name("global_pool", str(pool), ("avg", "token"))
    encoder = _encoder(state, config)
    sets, prompts, width = state[PROMPTS].shape
    blocks, dropout = len(encoder.blocks), float(config.get("dropout", 0.0))
    last = config.get("vpt_layer") or None
    if sets not in (1, blocks, last) or width != encoder.embed_dim:
        raise UsageError(
            f"{PROMPTS} is {tuple(state[PROMPTS].shape)}; expected ({blocks} or 1, classes, {encoder.embed_dim})"
        )
    if inferred["train_type"] == "prompt_cam":
        model = PromptCAM(
            encoder, prompts, depth="deep" if sets == blocks else "shallow", prompt_dropout=dropout, force=True
        )
        fill(model, {f"encoder.{_our_name(name, NAME)}": value for name, value in state.items()})
        return model.eval()
    # As released, prompts leave behind each block that has some: one set is the first block's.
    chosen = range(blocks - sets, blocks) if last is not None else range(sets)
    classes = len(state["head.weight"])
    insertion = VisualPrompts(
        encoder, prompts, "deep", dropout, num_classes=classes, blocks=list(chosen), batch_norm=False
    )
    insert(encoder, insertion, PLAIN)
    fill(encoder, {_our_name(name, PLAIN): value for name, value in state.items()})
    return encoder.eval()


def _inferred_from_shapes(state: Mapping[str, Tensor], last: bool) -> dict[str, Any]:
    """Return the published settings that the tensors themselves tell."""
    width, channels, patch, _ = state["patch_embed.proj.weight"].shape
    sets, prompts, _ = state[PROMPTS].shape
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    outputs = len(state["head.weight"])
    return {
        "patch_size": patch,
        "embed_dim": width,
        "in_chans": channels,
        "depth": depth,
        "mlp_ratio": Hidden(width, len(state["blocks.0.mlp.fc1.weight"])),
        "qkv_bias": "blocks.0.attn.qkv.bias" in state,
        "qk_norm": "blocks.0.attn.q_norm.weight" in state,
        "class_token": "cls_token" in state,
        "reg_tokens": state["reg_token"].shape[1] if "reg_token" in state else 0,
        "pre_norm": "norm_pre.weight" in state,
        "fc_norm": has(state, "fc_norm."),
        "global_pool": None if "cls_token" in state and not has(state, "fc_norm.") else "avg",
        "vpt_num": prompts,
        # With `vpt_layer` one set is that of the last block alone.
        "vpt_mode": None if depth == 1 or last else "deep" if sets > 1 else "shallow",
        "train_type": "prompt_cam" if outputs == 1 else "vpt",
        "num_classes": prompts if outputs == 1 else outputs,
    }


def _our_name(name: str, adapter: str) -> str:
    if name == PROMPTS or name.startswith("head."):
        return f"adapters.{adapter}.{'prompts' if name == PROMPTS else name}"
    return name


def _encoder(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> Encoder:
    """Return a fresh `VisionTransformer` of the shapes in the state dict."""
    width, channels, patch, _ = state["patch_embed.proj.weight"].shape
    heads = int(config.get("num_heads") or max(1, width // 64))
    if width % heads:
        raise UsageError(f"num_heads={heads} does not divide the width of {width}")
    registers = state["reg_token"].shape[1] if "reg_token" in state else 0
    prefix = registers + ("cls_token" in state)
    size, no_embed_class = _size(state["pos_embed"].shape[1], prefix, patch, config)
    # timm's own entry points carry the epsilon, so that a bundle can name it.
    epsilon = float(config.get("norm_eps", 1e-6))
    name = ENTRY_POINTS.get(epsilon, "vit_base_patch16_224")
    other: dict[str, Any] = {} if epsilon in ENTRY_POINTS else {"norm_layer": partial(LayerNorm, eps=epsilon)}
    encoder = create_encoder(
        name,
        image_size=size,
        in_chans=channels,
        patch_size=patch,
        global_pool=config["global_pool"],
        embed_dim=width,
        depth=len({name.split(".")[1] for name in state if name.startswith("blocks.")}),
        num_heads=heads,
        mlp_ratio=Hidden(width, len(state["blocks.0.mlp.fc1.weight"])).ratio,
        drop_path=float(config.get("drop_path", 0.0)),
        qkv_bias="blocks.0.attn.qkv.bias" in state,
        qk_norm="blocks.0.attn.q_norm.weight" in state,
        init_values=1.0 if "blocks.0.ls1.gamma" in state else None,
        class_token="cls_token" in state,
        reg_tokens=registers,
        no_embed_class=no_embed_class,
        pre_norm="norm_pre.weight" in state,
        fc_norm="fc_norm.weight" in state,
        final_norm=has(state, "norm.", "fc_norm."),
        act_layer=str(config.get("act", "gelu")),
        **other,
    )
    # All published models see images normalised by these, whatever their encoder was trained with.
    encoder.pretrained_cfg = {**encoder.pretrained_cfg, "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    if "patch_embed.proj.bias" in state and encoder.patch_embed.proj.bias is None:
        encoder.patch_embed.proj.bias = torch.nn.Parameter(torch.empty(width))
    return encoder


def _size(positions: int, prefix: int, patch: int, config: Mapping[str, Any]) -> tuple[tuple[int, int], bool]:
    """Return the image size (H, W), and whether prefix tokens are without position embedding."""
    given = config.get("image_size")
    size = None if given is None else (given, given) if isinstance(given, int) else (int(given[0]), int(given[1]))
    patches = None if size is None else (size[0] // patch) * (size[1] // patch)
    without = config.get("no_embed_class")
    if without is None:  # only one of the two gives a whole grid, as a rule
        counts = (positions - prefix, positions)
        fits = [
            count == patches if patches is not None else math.isqrt(max(count, 0)) ** 2 == count for count in counts
        ]
        without = fits[1] and not fits[0]
    count = positions if without else positions - prefix
    if patches is None:
        side = math.isqrt(max(count, 0))
        if side**2 != count or not count:
            raise UsageError(f"a position embedding of {positions} rows is of no square grid; give img_size=(H, W)")
        size = (side * patch, side * patch)
    elif patches != count:
        raise UsageError(
            f"img_size={given} has {patches} patches of {patch} pixels, but the position embedding has {count}"
        )
    assert size is not None
    return size, bool(without)
