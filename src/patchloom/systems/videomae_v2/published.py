"""Published VideoMAE V2 checkpoints: pre-training, bare encoder, and classifiers of both poolings (arXiv 2303.16727).

The distilled small and base models are plain classifiers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from patchloom.encoders import Encoder, create_encoder
from patchloom.errors import UsageError
from patchloom.models.published import fill, has, require
from patchloom.models.published_settings import Hidden, Settings, epsilon_of, name_of, set_epsilon
from patchloom.systems.videomae_v2.model import VideoMaskedAutoencoder

SETTINGS = Settings(
    obeyed=(
        *("image_size", "num_frames", "num_heads", "decoder_num_heads", "drop_path", "layer_norm_eps"),
        "head_drop_rate",
        *("positions", "normalize_target"),
    ),
    idle=(
        *(
            "init_scale",
            "with_cp",
            "attn_drop_rate",
            "decoder_num_classes",
            "encoder_num_classes",
            "model",
            "model_key",
        ),
        *("model_prefix", "sampling_rate", "num_segments", "num_sample", "num_crop", "mask_type", "mask_ratio"),
        *("decoder_mask_type", "decoder_mask_ratio", "data_root", "fname_tmpl", "init_values", "window_size"),
        *("test_num_segment", "test_num_crop", "dist_eval", "embed_layer", "sparse_sample", "drop_rate"),
    ),
    fixed={
        "qk_scale": (None,),
        "use_learnable_pos_emb": (False,),
        "act_layer": ("gelu",),
    },
    other_names={
        "img_size": "image_size",
        "input_size": "image_size",
        "all_frames": "num_frames",
        "encoder_in_chans": "in_chans",
        "encoder_embed_dim": "embed_dim",
        "encoder_depth": "depth",
        "encoder_num_heads": "num_heads",
        "decoder_dim": "decoder_embed_dim",
        "decoder_heads": "decoder_num_heads",
        "drop_path_rate": "drop_path",
        "fc_drop_rate": "head_drop_rate",
        "norm_layer": "layer_norm_eps",
        "nb_classes": "num_classes",
        "normlize_target": "normalize_target",
        "use_mean_pooling": "global_pool",
    },
    read={
        "layer_norm_eps": epsilon_of,
        "act_layer": name_of,
        "global_pool": lambda pool: {True: "avg", False: "token", "cls": "token"}.get(pool, pool),
    },
)
HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 16}
"""Attention heads of the published widths; others have one for 64 channels."""
DECODER_HEADS = {192: 3, 384: 6, 512: 8}
PREFIXES = ("encoder.", "backbone.")
SEPARATE = re.compile(r"(.*)\.attn\.(q_bias|v_bias)")


def load(state: Mapping[str, Tensor], **config: Any) -> nn.Module:
    """Return our module with a published state dict in it.

    Args:
        state: Tensors under the published names.
        **config: What shapes do not tell: `num_heads` and `decoder_num_heads` (default: the published sizes'),
            `img_size` (224) and `num_frames` (16) of the clips it is set up for, `drop_path` (0) and `head_drop_rate`
            (0) in training, `layer_norm_eps` (1e-6), `normalize_target` (True), `positions`: `running`, computed for
            the clip at hand, or `interpolated`, those of 16 frames of 224 pixels resampled, as the published
            fine-tuning does for other sizes. Names of the published code are understood; what shapes tell may be given
            and has to agree.

    Returns:
        `VideoMaskedAutoencoder` for a pre-training checkpoint with its decoder; a timm `VisionTransformer` of clips
        without head for an encoder alone; one with its classifier for a fine-tuned or distilled one.

    Raises:
        UsageError: Unknown setting, one that contradicts the tensors, or tensors missing or left over.
    """
    decoder = {name: value for name, value in state.items() if _of_decoder(name)}
    inner = {name: value for name, value in state.items() if name not in decoder}
    prefix = next((each for each in PREFIXES if inner and all(name.startswith(each) for name in inner)), "")
    inner = {name.removeprefix(prefix): value for name, value in inner.items()}
    for name in ("patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "blocks.0.mlp.fc1.weight"):
        if name not in inner:
            raise UsageError(f"the checkpoint has no {prefix}{name}, so it is no ViT of VideoMAE V2")
    if inner["patch_embed.proj.weight"].ndim != 5:
        raise UsageError("the patch embedding of the checkpoint is one of images; load it as mae")
    settled = SETTINGS.settle(_without_nothing(config, decoder, inner), _inferred(inner, decoder))
    encoder = _encoder(inner, settled, pretraining=bool(prefix or decoder))
    set_epsilon(encoder, settled.get("layer_norm_eps"))
    if not decoder:
        return fill(encoder, _ours(inner, encoder)).eval()
    require(
        decoder, "encoder_to_decoder.weight", "mask_token", "decoder.head.weight", "decoder.blocks.0.mlp.fc1.weight"
    )
    hidden, width = decoder["decoder.blocks.0.mlp.fc1.weight"].shape
    heads = int(settled.get("decoder_num_heads") or DECODER_HEADS.get(width, max(1, width // 64)))
    gamma = decoder.get("decoder.blocks.0.gamma_1")
    model = VideoMaskedAutoencoder(
        encoder,
        width,
        _count(decoder, "decoder.blocks."),
        heads,
        Hidden(width, hidden).ratio,
        decoder_init_values=0.0 if gamma is None else 1.0,
        cos_attn="decoder.blocks.0.attn.scale" in decoder,
        decoder_qkv_bias="decoder.blocks.0.attn.q_bias" in decoder,
        normalize_target=bool(settled.get("normalize_target", True)),
    )
    ours = {f"encoder.{name}": value for name, value in _ours(inner, encoder).items()}
    renamed = {
        name.replace("decoder.", "decoder_", 1): value for name, value in decoder.items() if name[:8] == "decoder."
    }
    kept = {name: decoder[name] for name in ("encoder_to_decoder.weight", "mask_token") if name in decoder}
    fill(model, ours | _ours(renamed, model) | kept)
    if (epsilon := settled.get("layer_norm_eps")) is not None:
        set_epsilon(model, epsilon)
    return model.eval()


def _of_decoder(name: str) -> bool:
    return name.startswith(("decoder.", "encoder_to_decoder.")) or name == "mask_token"


def _without_nothing(config: Mapping[str, Any], decoder: Mapping[str, Any], inner: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings without what a published constructor has of parts that are not there."""
    given = dict(config)
    if "head.weight" not in inner and not given.get("num_classes"):
        given.pop("num_classes", None)
    if decoder:  # one set of names for both halves, as the published class has it
        given.pop("use_mean_pooling", None)
    return given


def _inferred(inner: Mapping[str, Tensor], decoder: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the published settings that the tensors themselves tell."""
    width, channels, tubelet, patch, _ = inner["patch_embed.proj.weight"].shape
    hidden, _ = inner["blocks.0.mlp.fc1.weight"].shape
    head = inner.get("head.weight")
    return {
        "embed_dim": width,
        "in_chans": channels,
        "patch_size": patch,
        "tubelet_size": tubelet,
        "depth": _count(inner, "blocks."),
        "mlp_ratio": Hidden(width, hidden),
        "qkv_bias": any(name.endswith("attn.q_bias") for name in inner),
        "cos_attn": "blocks.0.attn.scale" in inner,
        "num_classes": None if head is None else len(head),
        "global_pool": None if head is None else "avg" if "fc_norm.weight" in inner else "token",
        "decoder_embed_dim": len(decoder["encoder_to_decoder.weight"]) if decoder else None,
        "decoder_depth": _count(decoder, "decoder.blocks.") if decoder else None,
    }


def _encoder(state: Mapping[str, Tensor], config: Mapping[str, Any], *, pretraining: bool) -> Encoder:
    """Return a fresh encoder, with a classifier where there is one, of the shapes in the state dict."""
    width, channels, tubelet, patch, _ = state["patch_embed.proj.weight"].shape
    heads = int(config.get("num_heads") or HEADS.get(width, max(1, width // 64)))
    if width % heads:
        raise UsageError(f"num_heads={heads} does not divide the width of {width}")
    size = config.get("image_size", 224)
    sides = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
    head = state.get("head.weight")
    normed, pooled = has(state, "norm."), has(state, "fc_norm.")
    if normed and pooled:
        raise UsageError("the checkpoint has norm and fc_norm, of which VideoMAE V2 has one or the other")
    variants: dict[str, Any] = {} if head is None else {"num_classes": len(head)}
    variants |= {"init_values": 1.0} if "blocks.0.gamma_1" in state else {}
    variants |= {"cos_attn": True} if "blocks.0.attn.scale" in state else {}
    # Without a classifier the encoder pools the mean of its normed tokens.
    token = head is not None and normed and not pretraining
    return create_encoder(
        "videomae_base_patch16_224",
        image_size=(int(config.get("num_frames", 16)), *sides),
        in_chans=channels,
        patch_size=patch,
        embed_dim=width,
        depth=_count(state, "blocks."),
        num_heads=heads,
        mlp_ratio=Hidden(width, len(state["blocks.0.mlp.fc1.weight"])).ratio,
        drop_path=float(config.get("drop_path", 0.0)),
        drop_rate=float(config.get("head_drop_rate", 0.0)),
        qkv_bias=any(name.endswith("attn.q_bias") for name in state),
        tubelet_size=tubelet,
        global_pool="token" if token else "avg",
        fc_norm=pooled,
        final_norm=normed or pooled,
        positions=config.get("positions", "running"),
        **variants,
    )


def _ours(state: Mapping[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """Return tensors under our names: biases fused as timm has them, layer scales in modules of their own."""
    ours: dict[str, Tensor] = {}
    biases: dict[str, dict[str, Tensor]] = {}
    fused = not any(name.endswith(".attn.scale") for name in state)
    for name, value in state.items():
        if fused and (match := SEPARATE.fullmatch(name)):
            biases.setdefault(match[1], {})[match[2]] = value
        elif match := re.fullmatch(r"(.*)\.gamma_([12])", name):
            ours[f"{match[1]}.ls{match[2]}.gamma"] = value
        else:
            ours[name] = value
    for block, parts in biases.items():
        if len(parts) != 2:
            raise UsageError(f"{block}.attn has {next(iter(parts))} and not its other bias")
        ours[f"{block}.attn.qkv.bias"] = torch.cat(
            [parts["q_bias"], torch.zeros_like(parts["q_bias"]), parts["v_bias"]]
        )
    return ours


def _count(state: Mapping[str, Tensor], prefix: str) -> int:
    """Return the number of modules in a list, by the names of its tensors."""
    place = prefix.count(".")
    return len({name.split(".")[place] for name in state if name.startswith(prefix)})


def select_head_rows(state: Mapping[str, Tensor], rows: list[int]) -> dict[str, Tensor]:
    """Return a classifier's tensors with some of its classes, in that order.

    So a model of Kinetics-710 becomes one of Kinetics-400, -600 or -700 (the published code's `label_710to400.json` …).

    Args:
        state: Tensors with `head.weight` (C, D) and `head.bias` (C,).
        rows: Numbers of the classes.

    Raises:
        UsageError: There is no such head, or no such class.
    """
    require(state, "head.weight", "head.bias")
    count = len(state["head.weight"])
    if wrong := [row for row in rows if not 0 <= row < count]:
        raise UsageError(f"there is no class {wrong[0]}; the head has classes 0 to {count - 1}")
    return {name: value[rows] if name in ("head.weight", "head.bias") else value for name, value in state.items()}
