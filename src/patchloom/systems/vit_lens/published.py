"""Checkpoints of ViT-Lens (github.com/TencentARC/ViT-Lens; arXiv 2311.16081): all senses, CLIP's ViTs and EVA."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from timm.layers import QuickGELU
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from patchloom.errors import UsageError
from patchloom.models.published import fill, has, require
from patchloom.models.published_settings import Settings
from patchloom.systems.vit_lens.lens import PerceiverLens, SelfAttentionLens
from patchloom.systems.vit_lens.model import ModalityEncoder, ViTLens
from patchloom.systems.vit_lens.tokenizers import (
    DepthTokenizer,
    MiniPointNet,
    PointTokenizer,
    SetAbstractionTokenizer,
    SignalTokenizer,
    SpectrogramTokenizer,
)

SENSES = {
    **dict.fromkeys(("points", "pc", "3dpc", "pointcloud", "point_cloud", "point cloud", "3d"), "pc"),
    **dict.fromkeys(("tactile", "touch"), "tactile"),
    **{name: name for name in ("depth", "audio", "eeg", "image", "text")},
}
"""Names of the senses in checkpoints, by what they are called."""
HEADS = {1280: 16, 1408: 16, 1664: 16}
"""Of published ViTs whose heads are not 64 wide."""
TEXT = ("token_embedding.", "positional_embedding", "transformer.", "ln_final.", "text_projection")
SETTINGS = Settings(
    obeyed=(
        *("modality", "num_heads", "head_width", "text_heads", "quick_gelu", "norm_eps", "image_size"),
        *("lens_heads", "lens_head_dim", "cross_heads", "cross_head_dim", "tie_weights", "fourier", "fourier_bands"),
        *("max_freq", "num_groups", "group_size", "radius", "mel_bins", "frames", "freq_stride", "time_stride"),
        *("stride", "signal_stride", "disable_orig_pos", "disable_adapter_pos", "unlock_cls", "unlock_pos"),
        *("unlock_first_blocks", "lens_kind"),
    ),
    idle=(
        *("model", "model_var", "modality_loaded", "pretrained", "pretrained_image", "precision", "cache_dir", "v_key"),
        *("visual_arch", "use_perceiver", "use_visual_adapter", "perceiver_as_identity", "perceiver_as_transformer"),
        *("pc_npoints", "npoints", "num_points", "pc_tokenizer", "tokenizer", "input_axis", "num_classes"),
        *("attn_dropout", "ff_dropout", "skip_first_blocks", "dataset_type", "aug_cfg", "force_quick_gelu"),
        *("force_custom_text", "force_image_size", "force_patch_dropout", "image_mean", "image_std"),
        *("load_ckpt_strict", "torchcompile", "torchscript", "trace", "use_bn_sync", "use_bnb_linear"),
        *("use_eva_pt_lin", "use_openclip_transform", "disable_pt_vit", "audio_clip_duration", "ckpt_pth"),
        *(
            "audio_sampling_rate",
            "lock_visual",
            "lock_image",
            "lock_text",
            "output_dict",
            "patch_dropout",
            "ls_init_value",
        ),
    ),
    other_names={
        **dict.fromkeys(("visual_modality_type", "sense"), "modality"),
        **dict.fromkeys(("heads", "vision_heads", "vit_heads", "n_heads"), "num_heads"),
        **dict.fromkeys(("layers", "vision_layers"), "depth"),
        **dict.fromkeys(("width", "vision_width", "vit_width", "hidden_size"), "embed_dim"),
        **dict.fromkeys(("img_size", "input_size"), "image_size"),
        **dict.fromkeys(("eps", "layer_norm_eps", "norm_layer"), "norm_eps"),
        **dict.fromkeys(("perceiver_latent_heads", "latent_heads", "self_heads"), "lens_heads"),
        **dict.fromkeys(("perceiver_latent_dim_head", "latent_dim_head", "head_dim", "self_dim_head"), "lens_head_dim"),
        "perceiver_cross_heads": "cross_heads",
        **dict.fromkeys(("perceiver_cross_dim_head", "cross_dim_head"), "cross_head_dim"),
        **dict.fromkeys(("perceiver_weight_tie_layers", "weight_tie_layers", "weight_tie"), "tie_weights"),
        **dict.fromkeys(("perceiver_fourier_encode_data", "fourier_encode_data"), "fourier"),
        **dict.fromkeys(("perceiver_num_freq_bands", "num_freq_bands"), "fourier_bands"),
        "perceiver_max_freq": "max_freq",
        **dict.fromkeys(("perceiver_num_latents", "num_latents"), "lens_tokens"),
        **dict.fromkeys(("perceiver_latent_dim", "latent_dim"), "lens_width"),
        **dict.fromkeys(("perceiver_input_chan", "input_chan", "input_channels"), "lens_in_dim"),
        "perceiver_depth": "lens_depth",
        **dict.fromkeys(("perceiver_self_per_cross_attn", "self_per_cross_attn"), "self_per_cross"),
        "perceiver_input_axis": "input_axis",
        "perceiver_num_classes": "num_classes",
        "perceiver_attn_dropout": "attn_dropout",
        "perceiver_ff_dropout": "ff_dropout",
        **dict.fromkeys(("pc_num_group", "num_group", "npoint"), "num_groups"),
        **dict.fromkeys(("pc_group_size", "nsample"), "group_size"),
        "pc_radius": "radius",
        **dict.fromkeys(("pc_encoder_dims", "encoder_dims"), "encoder_dim"),
        **dict.fromkeys(("pc_trans_dim", "trans_dim"), "token_width"),
        **dict.fromkeys(("pc_in_channel", "in_dim", "in_channel"), "point_features"),
        **dict.fromkeys(("audio_mel_bins", "input_fdim", "num_mel_bins", "bins"), "mel_bins"),
        **dict.fromkeys(("audio_target_length", "input_tdim", "target_length"), "frames"),
        **dict.fromkeys(("audio_fstride", "fstride"), "freq_stride"),
        **dict.fromkeys(("audio_tstride", "tstride"), "time_stride"),
        "eeg_stride": "signal_stride",
        "eeg_chans": "signal_channels",
        "eeg_window_size": "signal_window",
        "eeg_time_len": "signal_length",
        "disable_visual_adapter_pos": "disable_adapter_pos",
        "unlock_pos_emb": "unlock_pos",
        **dict.fromkeys(("unlock_trans_first_n_layers", "unlock_first_n"), "unlock_first_blocks"),
        **dict.fromkeys(("skip_trans_first_n_layers", "skip_first_n"), "skip_first_blocks"),
        "lens": "lens_kind",
    },
    sections={
        "vision_cfg": {},
        "text_cfg": {"heads": "text_heads", "width": "text_width", "layers": "text_layers"},
        "perceiver_cfg": {"depth": "lens_depth"},
        "perceiver": {"depth": "lens_depth", "heads": "lens_heads"},
        "visual_adapter_cfg": {},
        "visual_adapter": {},
        "preprocess_cfg": None,
    },
)
TOWER = (
    (r"^class_embedding$", "vit.cls_token"),
    (r"^positional_embedding$", "vit.pos_embed"),
    (r"^ln_pre\.", "vit.norm_pre."),
    (r"^ln_post\.", "vit.norm."),
    (r"^conv1\.", "vit.patch_embed.proj."),
    (r"^proj$", "projection.weight"),
    (r"^transformer\.resblocks\.", "vit.blocks."),
    (r"^visual_adapter\.", "tokenizer."),
    (r"^perceiver\.resblocks\.", "lens.blocks."),
    (r"^perceiver\.", "lens."),
    (r"^eva_vit_proj$", "projection.weight"),
    (r"^eva_vit_proj\.", "projection."),
    (r"^eva_vit\.", "vit."),
)
BLOCK = (
    ("ln_1.", "norm1."),
    ("ln_2.", "norm2."),
    ("attn.in_proj_weight", "attn.qkv.weight"),
    ("attn.in_proj_bias", "attn.qkv.bias"),
    ("attn.out_proj.", "attn.proj."),
    ("mlp.c_fc.", "mlp.fc1."),
    ("mlp.c_proj.", "mlp.fc2."),
)
COUNTER = "num_batches_tracked"


def load(state: Mapping[str, Tensor], **config: Any) -> nn.Module:
    """Return the model of a published checkpoint, or the part whose state it is.

    Args:
        state: Tensors of a training checkpoint (`visual.…`, and perhaps `image.…`, those of the text tower and
            `logit_scale`), of the model of all senses (`vitlens.SENSE.…`), of OpenShape's (`backbone.…`), of a tower
            alone, or of one part: lens, tokenizer, PointNet of a group.
        **config: `modality` (points, depth, audio, tactile, eeg) where a checkpoint has several; of points `num_groups`
            (512), `group_size` (32, in balls 64), `radius` (0.2); of audio `mel_bins` (128), `freq_stride` and
            `time_stride` (10); of EEG `signal_stride` (1); `num_heads`, `lens_heads`, `text_heads`, where heads are not
            64 wide; the configuration of the published code may be given whole.

    Returns:
        `ModalityEncoder`; `ViTLens`, where the checkpoint has other towers besides; or the part.

    Raises:
        UsageError: A setting that is unknown, missing or contradicts the tensors; tensors missing or left over.
    """
    given = SETTINGS.renamed(config)
    sense = given.get("modality")
    if sense is not None and str(sense).lower() not in SENSES:
        raise UsageError(f"modality is {sense!r}; there are points, depth, audio, tactile, eeg and image")
    if has(state, "vitlens."):
        state = _one_sense(state, sense)
    if has(state, "backbone."):
        state = {re.sub(r"^backbone\.", "visual.", name): value for name, value in state.items()}
    if has(state, "visual."):
        return _towers(dict(state), config)
    return _part(dict(state), config)


def _one_sense(state: Mapping[str, Tensor], sense: Any) -> dict[str, Tensor]:
    """Return the tensors of one tower of the model of all senses."""
    found = sorted({name.split(".")[1] for name in state if name.startswith("vitlens.")})
    others = [name for name in found if name not in ("image", "text")]
    if sense is None and len(others) == 1:
        sense = others[0]
    if sense is None or SENSES[str(sense).lower()] not in found:
        raise UsageError(f"the checkpoint holds {', '.join(found)}; say by modality which of them to load")
    prefix = f"vitlens.{SENSES[str(sense).lower()]}."
    chosen = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    if foreign := [name for name in state if not name.startswith("vitlens.")]:
        chosen |= {name: state[name] for name in foreign}
    return chosen


def _towers(state: dict[str, Tensor], config: Mapping[str, Any]) -> nn.Module:
    """Return the sense's tower, with those of images and texts where the checkpoint has them."""
    parts: dict[str, dict[str, Tensor]] = {"visual": {}, "image": {}, "text": {}}
    left: dict[str, Tensor] = {}
    for name, value in state.items():
        top, _, rest = name.partition(".")
        if top in parts and rest:
            parts[top][rest] = value
        elif name.startswith(TEXT):
            parts["text"][name] = value
        elif name.rsplit(".", 1)[-1] != "attn_mask":
            left[name] = value
    scale = left.pop("logit_scale", None)
    head = {name: left.pop(name) for name in list(left) if name.startswith("proj_layer.")}
    visual, ours, names = _tower(parts["visual"], config, head)
    module: nn.Module = visual
    state_dict, published = dict(ours), {name: f"visual.{theirs}" for name, theirs in names.items()}
    if parts["image"] or parts["text"]:
        image, text = None, None
        state_dict = {f"visual.{name}": value for name, value in ours.items()}
        published = {f"visual.{name}": f"visual.{theirs}" for name, theirs in names.items()}
        if parts["image"]:
            image, tensors, theirs_of = _tower(parts["image"], _of_images(config), {})
            state_dict |= {f"image.{name}": value for name, value in tensors.items()}
            published |= {f"image.{name}": f"image.{theirs}" for name, theirs in theirs_of.items()}
        if parts["text"]:
            text = _text_tower(parts["text"], config)
            state_dict |= {f"text.{name}": value for name, value in parts["text"].items()}
        module = ViTLens(visual, image, text)
        require({**left, **({} if scale is None else {"logit_scale": scale})}, "logit_scale")
        assert scale is not None
        state_dict["logit_scale"] = scale.reshape(())
    return _filled(module, {**state_dict, **left}, published, "" if module is not visual else "visual.")


def _of_images(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that concern the ViT, for the tower of images."""
    shared = ("num_heads", "head_width", "quick_gelu", "norm_eps", "image_size", "patch_size")
    return {name: value for name, value in SETTINGS.renamed(config).items() if name in shared}


def _part(state: dict[str, Tensor], config: Mapping[str, Any]) -> nn.Module:
    """Return a tower alone, or one part of it."""
    if has(state, "class_embedding", "eva_vit.", "transformer.resblocks.", "cls_token"):
        if has(state, "cls_token"):  # an EVA-ViT alone
            state = {f"eva_vit.{name}": value for name, value in state.items()}
        state.pop("logit_scale", None)
        module, ours, names = _tower(state, config, {})
        return _filled(module, ours, names)
    bare = {name.removeprefix("perceiver."): value for name, value in state.items()}
    if has(bare, "latents", "layers."):
        settled = _settle(config, {})
        return _filled(_perceiver(bare, settled), bare, {name: name for name in bare})
    bare = {name.removeprefix("visual_adapter."): value for name, value in state.items()}
    if has(bare, "first_conv."):
        require(bare, "second_conv.3.weight")
        _settle(config, {})
        return _filled(MiniPointNet(len(bare["second_conv.3.weight"])), bare, {})
    if has(bare, "encoder.", "sa.", "conv1.", "proj."):
        tokenizer = _tokenizer(bare, _settle(config, {}), lens=False)
        return _filled(tokenizer, _shaped(bare, tokenizer), {})
    raise UsageError(
        f"this is no checkpoint of ViT-Lens: there is no visual., vitlens., perceiver. or visual_adapter. among "
        f"{', '.join(list(state)[:6])}"
    )


def _settle(config: Mapping[str, Any], told: Mapping[str, Any]) -> dict[str, Any]:
    known = dict.fromkeys(
        (
            *(
                "embed_dim",
                "depth",
                "patch_size",
                "mlp_ratio",
                "output_dim",
                "lens_tokens",
                "lens_width",
                "lens_in_dim",
            ),
            *("lens_depth", "self_per_cross", "encoder_dim", "token_width", "point_features", "signal_channels"),
            *("signal_window", "signal_length", "text_width", "text_layers", "vocab_size", "context_length"),
        )
    )
    return SETTINGS.settle(config, {**known, **told})


def _tower(
    state: Mapping[str, Tensor], config: Mapping[str, Any], head: Mapping[str, Tensor]
) -> tuple[ModalityEncoder, dict[str, Tensor], dict[str, str]]:
    """Return a tower without its weights, these under our names, and the published names by ours."""
    eva = has(state, "eva_vit.")
    names = {_ours(name): name for name in state}
    tensors = {_ours(name): value for name, value in state.items()}
    if eva:
        _merge_biases(tensors, names)
    require_all(tensors, names, eva)
    width = tensors["vit.pos_embed"].shape[-1]
    tensors["vit.cls_token"] = tensors["vit.cls_token"].reshape(1, 1, -1)
    tensors["vit.pos_embed"] = tensors["vit.pos_embed"].reshape(1, -1, width)
    adapter = {n.removeprefix("tokenizer."): v for n, v in tensors.items() if n.startswith("tokenizer.")}
    lens_state = {n.removeprefix("lens."): v for n, v in tensors.items() if n.startswith("lens.")}
    depth = _count(tensors, "vit.blocks")
    patch = tensors.get("vit.patch_embed.proj.weight")
    told: dict[str, Any] = {"embed_dim": width}
    if patch is not None and not adapter:
        told["patch_size"] = int(patch.shape[-1])
    if has(lens_state, "latents"):
        told |= {"lens_tokens": len(lens_state["latents"]), "lens_depth": _count(lens_state, "layers")}
        told["lens_width"] = int(lens_state["latents"].shape[1])
    settled = _settle(config, told)
    tokenizer = _tokenizer(adapter, settled, lens=bool(lens_state)) if adapter else None
    if tokenizer is not None:
        shaped = _shaped(adapter, tokenizer)
        tensors |= {f"tokenizer.{name}": value for name, value in shaped.items()}
    kind = settled.get("lens_kind")
    if kind == "perceiver" and not has(lens_state, "latents"):
        raise UsageError("missing: perceiver.latents; the checkpoint has no lens, and lens=perceiver asks for one")
    if isinstance(tokenizer, (PointTokenizer, SetAbstractionTokenizer)) and not lens_state:
        raise UsageError("missing: perceiver.latents; tokens of points come to the ViT through a lens only")
    lens = None if not lens_state else _lens(lens_state, settled)
    vit = _vit(tensors, settled, depth, eva, keep_patches=tokenizer is None)
    projection, tensors = _projection(tensors, head, width)
    encoder = ModalityEncoder(
        vit,
        tokenizer,
        lens,
        projection,
        unlock_cls=bool(settled.get("unlock_cls", False)),
        unlock_pos=bool(settled.get("unlock_pos", False)),
        unlock_first_blocks=int(settled.get("unlock_first_blocks", 0)),
        unlock_projection=eva,
        vit_positions=not settled.get("disable_orig_pos", False),
        tokenizer_positions=not settled.get("disable_adapter_pos", False),
    )
    return encoder, tensors, names


def require_all(tensors: Mapping[str, Tensor], names: dict[str, str], eva: bool) -> None:
    """Refuse a tower without what tells its shape.

    Raises:
        UsageError: Names what is missing, as the file calls it.
    """
    for name in ("vit.cls_token", "vit.pos_embed", "vit.blocks.0.mlp.fc1.weight", "vit.blocks.0.attn.qkv.weight"):
        if name not in tensors:
            raise UsageError(f"missing: {_theirs(name, eva)}")


def _vit(
    tensors: Mapping[str, Tensor], settled: Mapping[str, Any], depth: int, eva: bool, keep_patches: bool
) -> VisionTransformer:
    """Return a plain ViT of the shape the tensors tell."""
    width = int(tensors["vit.cls_token"].shape[-1])
    rows = tensors["vit.pos_embed"].shape[1] - 1
    patch = tensors.get("vit.patch_embed.proj.weight")
    if keep_patches and patch is None:
        raise UsageError(f"missing: {_theirs('vit.patch_embed.proj.weight', eva)} (there is no visual_adapter either)")
    size = tuple(patch.shape[2:]) if patch is not None else (1, 1)
    sides: Any = settled.get("image_size")
    if isinstance(sides, int):
        sides = (sides, sides)
    if sides is None or not keep_patches or (sides[0] // size[0]) * (sides[1] // size[1]) != rows:
        side = round(rows**0.5)
        if keep_patches and side**2 != rows:
            raise UsageError(f"positional_embedding has {rows} positions, which are no square; give image_size")
        sides = (side * size[0], side * size[1]) if keep_patches else size
    hidden = len(tensors["vit.blocks.0.mlp.fc1.weight"])
    eps = float(settled.get("norm_eps", 1e-6 if eva else 1e-5))
    vit = VisionTransformer(
        img_size=tuple(sides),
        patch_size=(size[0], size[1]),
        in_chans=3 if patch is None else patch.shape[1],
        num_classes=0,
        embed_dim=width,
        depth=depth,
        num_heads=_heads(width, settled.get("num_heads"), settled.get("head_width"), "num_heads"),
        mlp_ratio=(hidden + 0.5) / width if int(width * (hidden / width)) != hidden else hidden / width,
        qkv_bias="vit.blocks.0.attn.qkv.bias" in tensors,
        pre_norm=not eva,
        norm_layer=partial(nn.LayerNorm, eps=eps),
        act_layer=QuickGELU if settled.get("quick_gelu") else None,
    )
    if eva and "vit.norm.weight" not in tensors:
        vit.norm = nn.Identity()  # of a language model, which has its own
    if not keep_patches:
        vit.pos_embed = nn.Parameter(torch.zeros(1, rows + 1, width))
    return vit


def _projection(
    tensors: dict[str, Tensor], head: Mapping[str, Tensor], width: int
) -> tuple[nn.Module | None, dict[str, Tensor]]:
    """Return what leads to the common space, and the tensors with it as linear layers have them."""
    tensors = dict(tensors)
    copy = {name: tensors.pop(name) for name in list(tensors) if name.startswith("vit.head.")}
    weight = tensors.get("projection.weight")
    if weight is None and copy:
        tensors |= {name.replace("vit.head.", "projection."): value for name, value in copy.items()}
    elif weight is not None and "projection.bias" not in tensors and not copy:
        weight = tensors["projection.weight"] = weight.T.contiguous()
    if (weight := tensors.get("projection.weight")) is None:
        return None, tensors
    linear: nn.Module = nn.Linear(weight.shape[1], len(weight), bias="projection.bias" in tensors)
    if not head:
        return linear, tensors
    require(head, "proj_layer.weight")
    for name in [name for name in tensors if name.startswith("projection.")]:
        tensors[name.replace("projection.", "projection.0.")] = tensors.pop(name)
    tensors |= {name.replace("proj_layer.", "projection.1."): value for name, value in head.items()}
    last = nn.Linear(len(weight), len(head["proj_layer.weight"]), bias="proj_layer.bias" in head)
    return nn.Sequential(linear, last), tensors


def _merge_biases(tensors: dict[str, Tensor], names: dict[str, str]) -> None:
    """Put EVA's biases of queries and values into one of queries, keys and values; keys have none."""
    for name in [name for name in tensors if name.endswith("attn.q_bias")]:
        other = name.replace("q_bias", "v_bias")
        if other not in tensors:
            raise UsageError(f"missing: {_theirs(other, True)}")
        query, value = tensors.pop(name), tensors.pop(other)
        merged = name.replace("q_bias", "qkv.bias")
        tensors[merged] = torch.cat([query, torch.zeros_like(query), value])
        names[merged] = names[name]


def _tokenizer(state: Mapping[str, Tensor], settled: Mapping[str, Any], lens: bool) -> Any:
    """Return the tokenizer whose tensors these are, without them."""
    if has(state, "encoder."):
        require(state, "encoder.second_conv.3.weight", "reduce_dim.weight")
        return PointTokenizer(
            int(settled.get("num_groups", 512)),
            int(settled.get("group_size", 32)),
            len(state["encoder.second_conv.3.weight"]),
            len(state["reduce_dim.weight"]),
        )
    if has(state, "sa."):
        require(state, "lift.0.weight")
        last = _count(state, "sa.mlp_convs") - 1
        require(state, *(f"sa.mlp_convs.{number}.weight" for number in range(last + 1)))
        widths = [len(state[f"sa.mlp_convs.{number}.weight"]) for number in range(last + 1)]
        return SetAbstractionTokenizer(
            int(settled.get("num_groups", 512)),
            int(settled.get("group_size", 64)),
            float(settled.get("radius", 0.2)),
            int(state["sa.mlp_convs.0.weight"].shape[1]) - 3,
            widths[-1],
            len(state["lift.0.weight"]),
            tuple(widths[:-1]),  # type: ignore[arg-type]
        )
    require(state, "pos_emb")
    count, width = state["pos_emb"].shape[-2:]
    if has(state, "proj."):
        require(state, "proj.weight")
        window, stride = int(state["proj.weight"].shape[2]), int(settled.get("signal_stride", settled.get("stride", 1)))
        return SignalTokenizer(int(state["proj.weight"].shape[1]), (count - 1) * stride + window, width, window, stride)
    require(state, "conv1.weight")
    weight = state["conv1.weight"]
    patch = int(weight.shape[2]), int(weight.shape[3])
    sense = settled.get("modality")
    audible = any(name in settled for name in ("mel_bins", "frames", "freq_stride", "time_stride"))
    if (SENSES[str(sense).lower()] == "audio") if sense is not None else (lens or audible):
        return _spectrogram(count, width, patch, settled)
    size: Any = settled.get("image_size")
    size = (size, size) if isinstance(size, int) else size
    if size is None or (size[0] // patch[0]) * (size[1] // patch[1]) != count:
        side = round(count**0.5)
        if side**2 != count:
            raise UsageError(f"pos_emb has {count} positions, which are no square; give image_size, or modality=audio")
        size = side * patch[0], side * patch[1]
    return DepthTokenizer(tuple(size), patch, width, int(weight.shape[1]))


def _spectrogram(count: int, width: int, patch: tuple[int, int], settled: Mapping[str, Any]) -> SpectrogramTokenizer:
    both = settled.get("stride", 10)
    both = both if isinstance(both, (list, tuple)) else (both, both)
    stride = int(settled.get("freq_stride", both[0])), int(settled.get("time_stride", both[1]))
    bins, frames = int(settled.get("mel_bins", 128)), settled.get("frames")
    rows = (bins - patch[0]) // stride[0] + 1
    if rows < 1 or count % rows:
        raise UsageError(
            f"pos_emb has {count} positions, and {bins} tones at a stride of {stride[0]} give rows of {max(rows, 0)}; "
            f"give mel_bins, freq_stride and time_stride"
        )
    columns = count // rows
    if frames is not None and (int(frames) - patch[1]) // stride[1] + 1 != columns:
        raise UsageError(f"frames is {frames}, but the checkpoint has positions for {columns} places along time")
    return SpectrogramTokenizer(
        (columns - 1) * stride[1] + patch[1] if frames is None else int(frames), bins, patch, stride, width
    )


def _shaped(state: Mapping[str, Tensor], tokenizer: nn.Module) -> dict[str, Tensor]:
    """Return tensors of a tokenizer in its shapes: kernels of one point have an axis more or less in some files."""
    meant = tokenizer.state_dict()
    return {
        name: value.reshape(meant[name].shape)
        if name in meant
        and value.numel() == meant[name].numel()
        and value.squeeze().shape == meant[name].squeeze().shape
        else value
        for name, value in state.items()
    }


def _lens(state: Mapping[str, Tensor], settled: Mapping[str, Any]) -> nn.Module:
    if not has(state, "blocks."):
        return _perceiver(state, settled)
    require(state, "blocks.0.mlp.fc1.weight", "blocks.0.norm1.weight")
    width = len(state["blocks.0.norm1.weight"])
    heads = _heads(width, settled.get("num_heads"), settled.get("head_width"), "num_heads")
    return SelfAttentionLens(width, _count(state, "blocks"), heads, len(state["blocks.0.mlp.fc1.weight"]) / width)


def _perceiver(state: Mapping[str, Tensor], settled: Mapping[str, Any]) -> PerceiverLens:
    require(state, "latents", "layers.0.0.fn.to_q.weight", "layers.0.0.fn.to_kv.weight")
    width = int(state["latents"].shape[1])
    cross = len(state["layers.0.0.fn.to_q.weight"])
    depth, inner = _count(state, "layers"), _count(state, "layers.0.2")
    bands = int(settled.get("fourier_bands") or 0) if settled.get("fourier") else 0
    cross_dim = settled.get("cross_head_dim")
    cross_heads = int(settled.get("cross_heads") or (cross // int(cross_dim) if cross_dim else 1))
    if cross % cross_heads or (cross_dim and cross // cross_heads != int(cross_dim)):
        raise UsageError(f"cross_heads={cross_heads} of {cross_dim or 'any width'} do not make the {cross} of to_q")
    heads, dim = 1, width
    if inner:
        require(state, "layers.0.2.0.0.fn.to_q.weight")
        total = len(state["layers.0.2.0.0.fn.to_q.weight"])
        heads = _heads(total, settled.get("lens_heads"), settled.get("lens_head_dim"), "lens_heads")
        dim = total // heads
    tied = depth > 2 and _tied(state, depth)
    if settled.get("tie_weights") and depth > 2 and not tied:
        raise UsageError("tie_weights is set, but the stages of the lens hold different tensors; leave it out")
    return PerceiverLens(
        int(state["layers.0.0.fn.to_kv.weight"].shape[1]) - (2 * bands + 1 if bands else 0),
        width,
        len(state["latents"]),
        depth,
        inner,
        cross_heads,
        cross // cross_heads,
        heads,
        dim,
        tied,
        bands,
        float(settled.get("max_freq", 10.0)),
    )


def _tied(state: Mapping[str, Tensor], depth: int) -> bool:
    """Return whether all stages behind the first hold the same tensors."""
    second = {name: value for name, value in state.items() if name.startswith("layers.1.")}
    return all(
        (other := state.get(f"layers.{number}.{name.removeprefix('layers.1.')}")) is not None
        and other.shape == value.shape
        and torch.equal(other, value)
        for number in range(2, depth)
        for name, value in second.items()
    )


def _text_tower(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> nn.Module:
    from patchloom.systems.clip.text import TextTower

    require(state, "token_embedding.weight", "positional_embedding", "text_projection")
    vocabulary, width = state["token_embedding.weight"].shape
    given = SETTINGS.renamed(config).get("text_heads")
    return TextTower(
        context_length=len(state["positional_embedding"]),
        vocab_size=int(vocabulary),
        width=int(width),
        heads=_heads(int(width), given, None, "text_heads"),
        layers=_count(state, "transformer.resblocks"),
        output_dim=int(state["text_projection"].shape[1]),
    )


def _heads(width: int, heads: Any, head_width: Any, name: str) -> int:
    """Return the number of heads: as given, or 64 wide but for the ViTs whose are not."""
    if heads is None and head_width is None and width not in HEADS and width % 64:
        raise UsageError(f"tensors do not tell the number of heads of a width of {width}; give {name}")
    number = int(heads) if heads else width // int(head_width) if head_width else HEADS.get(width, width // 64)
    if not number or width % number:
        raise UsageError(f"{name} is {number}, which does not divide the width {width}")
    return number


def _count(state: Mapping[str, Tensor], prefix: str) -> int:
    numbers = [int(m[1]) for name in state if (m := re.match(rf"{re.escape(prefix)}\.(\d+)\.", name))]
    return 1 + max(numbers, default=-1)


def _ours(name: str) -> str:
    for pattern, replacement in TOWER:
        renamed, count = re.subn(pattern, replacement, name)
        if count:
            name = renamed
            break
    if ".blocks." in name and name.startswith(("vit.", "lens.")):
        for theirs, ours in BLOCK:
            name = name.replace(theirs, ours)
    return name


def _theirs(name: str, eva: bool) -> str:
    """Return what a checkpoint calls a tensor of ours."""
    if eva:
        name = re.sub(r"^vit\.", "eva_vit.", name).replace("projection.weight", "eva_vit_proj")
        return name.replace("tokenizer.", "visual_adapter.").replace("lens.", "perceiver.")
    if ".blocks." in name and name.startswith(("vit.", "lens.blocks.")):
        for theirs, ours in BLOCK:
            name = name.replace(ours, theirs)
    for pattern, replacement in TOWER:
        if (
            "eva" not in pattern
            and name.startswith(replacement)
            and not (replacement == "lens." and ".blocks." in name)
        ):
            return name.replace(replacement, re.sub(r"[\^$\\]", "", pattern), 1)
    return name


def _filled(module: nn.Module, state: Mapping[str, Tensor], names: Mapping[str, str], prefix: str = "") -> nn.Module:
    """Fill a module; messages speak of the file, and counters of batches may be missing."""
    eva = any("eva_vit" in theirs for theirs in names.values())

    def published(name: str) -> str:
        if name in names:
            return names[name]
        top, _, rest = name.partition(".")
        return f"{top}.{_theirs(rest, eva)}" if top in ("visual", "image") else prefix + _theirs(name, eva)

    counters = [name for name in module.state_dict() if name.endswith(COUNTER)]
    return fill(module, state, may_lack=counters, published=published)
