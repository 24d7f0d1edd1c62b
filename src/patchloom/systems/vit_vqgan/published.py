"""Checkpoints in the layout of github.com/thuanz123/enhancing-transformers: tokenizer, discriminator, transformer."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from patchloom.base.sizes import Size, checked_size, pair
from patchloom.errors import UsageError
from patchloom.models.published import fill, has, require
from patchloom.models.published_settings import Settings
from patchloom.systems.vim.model import ImageGPT
from patchloom.systems.vit_vqgan.config import TransformerSize
from patchloom.systems.vit_vqgan.discriminator import BLUR, StyleGANDiscriminator
from patchloom.systems.vit_vqgan.model import ViTVQGAN

PARTS = ("tokenizer", "discriminator", "transformer")
HEAD_DIM = 64
OF_QUANTIZER = {
    "embed_dim": "code_dim",
    "n_embed": "num_codes",
    "use_norm": "l2_normalize",
    "num_quantizers": "num_residual",
    "use_residual": "use_residual",
    "straight_through": "straight_through",
    "temp_init": "temperature",
}
SETTINGS = Settings(
    obeyed=(
        *("image_size", "heads", "head_dim", "decoder_heads", "decoder_head_dim", "part", "kind"),
        *("beta", "l2_normalize", "num_residual", "use_residual", "detach_residual", "temperature"),
        *("num_heads", "token_shift"),
    ),
    idle=("loss", "path", "ignore_keys", "scheduler", "straight_through", "image_key", "permuter", "cond_key"),
    other_names={
        **OF_QUANTIZER,
        "embed_dim": "dim",
        "n_heads": "num_heads",
        "n_layers": "depth",
        "vocab_cond_size": "num_classes",
        "vocab_img_size": "vocab",
        "img_num_tokens": "num_tokens",
        "cond_num_tokens": "num_cond",
        "attn_bias": "qkv_bias",
    },
    sections={
        "encoder": {"dim_head": "head_dim", "channels": "in_chans"},
        "decoder": {
            "dim": "decoder_dim",
            "depth": "decoder_depth",
            "heads": "decoder_heads",
            "mlp_dim": "decoder_mlp_dim",
            "dim_head": "decoder_head_dim",
            "channels": "in_chans",
        },
        "quantizer": OF_QUANTIZER,
        "transformer": {},
        "stage1": None,
        "cond": None,
    },
)


def load(state: Mapping[str, Tensor], **config: Any) -> nn.Module:
    """Return our module with a published state dict in it.

    Args:
        state: Tensors under the published names: of stage 1 (`encoder.…`, `decoder.…`, `quantizer.…`, and `loss.…`,
            which is left out), of stage 2 (`transformer.…`, and `stage1_model.…`, `cond_model.…`, which are), or of a
            discriminator alone.
        **config: What shapes do not tell: `part` (tokenizer, discriminator or transformer, where a file has several;
            default: the transformer of stage 2, else the tokenizer); `image_size` (H, W) where it is not square; heads
            of 64 channels by default, else `heads` or `dim_head` of `encoder` and `decoder`; of `quantizer` `beta`
            (0.25), `use_norm` (True), `use_residual` and `num_quantizers`, and `kind=gumbel` with `temp_init`; of stage
            2 `n_heads` (16). What shapes tell may be given and has to agree.

    Returns:
        `ViTVQGAN`, `StyleGANDiscriminator` or `ImageGPT`.

    Raises:
        UsageError: Unknown setting, or tensors missing or left over.
    """
    part = config.get("part") or _part_of(state)
    if part not in PARTS:
        raise UsageError(f"part is {part!r}; a checkpoint has {', '.join(PARTS)}")
    if part == "discriminator":
        return _discriminator(_below(state, "loss.discriminator.", "discriminator."), config)
    if part == "transformer":
        return _transformer(_below(state, "transformer."), config)
    inner = {name.removeprefix("stage1_model."): v for name, v in state.items() if name.startswith("stage1_model.")}
    return _tokenizer({name: v for name, v in (inner or dict(state)).items() if not name.startswith("loss.")}, config)


def _part_of(state: Mapping[str, Tensor]) -> str:
    if has(state, "transformer.tok_emb_code.", "tok_emb_code."):
        return "transformer"
    if has(state, "encoder.", "stage1_model."):
        return "tokenizer"
    if any(re.search(r"(^|\.)final_linear\.", name) for name in state):
        return "discriminator"
    raise UsageError(
        "the checkpoint has none of encoder.to_patch_embedding, transformer.tok_emb_code and final_linear, so it is no "
        "ViT-VQGAN"
    )


def _below(state: Mapping[str, Tensor], *prefixes: str) -> dict[str, Tensor]:
    """Return the tensors below the first prefix there is, without it; all of them where there is none."""
    for prefix in prefixes:
        found = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        if found:
            return found
    return dict(state)


# Stage 1.

_TOKENIZER = (
    (r"encoder\.to_patch_embedding\.0\.", "encoder.proj."),
    (r"encoder\.en_pos_embedding$", "encoder.pos_embed"),
    (r"decoder\.de_pos_embedding$", "decoder.pos_embed"),
    (r"decoder\.to_pixel\.1\.", "decoder.proj."),
    (r"\.layers\.(\d+)\.0\.norm\.", r".blocks.\1.norm1."),
    (r"\.layers\.(\d+)\.0\.fn\.to_qkv\.", r".blocks.\1.attn.qkv."),
    (r"\.layers\.(\d+)\.0\.fn\.to_out\.", r".blocks.\1.attn.proj."),
    (r"\.layers\.(\d+)\.1\.norm\.", r".blocks.\1.norm2."),
    (r"\.layers\.(\d+)\.1\.fn\.net\.", r".blocks.\1.mlp."),
)


def _tokenizer(state: dict[str, Tensor], config: Mapping[str, Any]) -> nn.Module:
    require(
        state,
        *("encoder.to_patch_embedding.0.weight", "encoder.en_pos_embedding", "decoder.de_pos_embedding"),
        *("encoder.transformer.layers.0.0.fn.to_qkv.weight", "encoder.transformer.layers.0.1.fn.net.0.weight"),
        *("decoder.transformer.layers.0.0.fn.to_qkv.weight", "decoder.transformer.layers.0.1.fn.net.0.weight"),
        *("quantizer.embedding.weight", "decoder.to_pixel.1.weight"),
    )
    dim, channels, patch, _ = state["encoder.to_patch_embedding.0.weight"].shape
    count, code_dim = state["quantizer.embedding.weight"].shape
    shapes = {side: _shape(state, side) for side in ("encoder", "decoder")}
    inferred = {
        "dim": dim,
        "depth": shapes["encoder"][1],
        "mlp_dim": shapes["encoder"][2],
        "decoder_dim": shapes["decoder"][0],
        "decoder_depth": shapes["decoder"][1],
        "decoder_mlp_dim": shapes["decoder"][2],
        "patch_size": patch,
        "in_chans": channels,
        "num_codes": count,
        "code_dim": code_dim,
    }
    flat = {"embed_dim": "code_dim"}
    settled = SETTINGS.settle({flat.get(name, name): value for name, value in config.items()}, inferred)
    size = _image_size(settled.get("image_size"), state["encoder.en_pos_embedding"].shape[1], patch)
    residual = int(settled.get("num_residual") or 1)
    if settled.get("use_residual") is False:
        residual = 1
    out_channels = state["decoder.to_pixel.1.weight"].shape[1]
    model = ViTVQGAN(
        size,
        patch,
        _size(state, "encoder", shapes["encoder"], settled.get("heads"), settled.get("head_dim")),
        _size(
            state,
            "decoder",
            shapes["decoder"],
            settled.get("decoder_heads", settled.get("heads") if dim == shapes["decoder"][0] else None),
            settled.get("decoder_head_dim", settled.get("head_dim")),
        ),
        count,
        code_dim,
        channels,
        with_scale=out_channels == 2 * channels,
        beta=float(settled.get("beta", 0.25)),
        l2_normalize=bool(settled.get("l2_normalize", True)),
        num_residual=residual,
        detach_residual=bool(settled.get("detach_residual", True)),
        kind=settled.get("kind", "nearest"),
        temperature=float(settled.get("temperature", 1.0)),
    )
    ours = {_renamed(name, _TOKENIZER): value for name, value in state.items()}
    published = {_renamed(name, _TOKENIZER): name for name in state}
    return fill(model, ours, published=lambda name: published.get(name, _theirs(name)))


def _theirs(name: str) -> str:
    """Return the published name of one of our tensors that the checkpoint lacks."""
    for pattern, ours in (
        (r"^encoder\.proj\.", "encoder.to_patch_embedding.0."),
        (r"^decoder\.proj\.", "decoder.to_pixel.1."),
        (r"\.blocks\.(\d+)\.norm([12])\.", lambda m: f".layers.{m[1]}.{int(m[2]) - 1}.norm."),
        (r"\.blocks\.(\d+)\.attn\.qkv\.", r".layers.\1.0.fn.to_qkv."),
        (r"\.blocks\.(\d+)\.attn\.proj\.", r".layers.\1.0.fn.to_out."),
        (r"\.blocks\.(\d+)\.mlp\.", r".layers.\1.1.fn.net."),
    ):
        name = re.sub(pattern, ours, name)
    return name


def _shape(state: Mapping[str, Tensor], side: str) -> tuple[int, int, int, int]:
    """Return width, depth, MLP width and width of all heads together of encoder or decoder."""
    prefix = f"{side}.transformer.layers."
    inner, dim = state[f"{prefix}0.0.fn.to_qkv.weight"].shape
    layers = {name.removeprefix(prefix).split(".")[0] for name in state if name.startswith(prefix)}
    return dim, len(layers), len(state[f"{prefix}0.1.fn.net.0.weight"]), inner // 3


def _size(
    state: Mapping[str, Tensor], side: str, shape: tuple[int, int, int, int], heads: Any, head_dim: Any
) -> TransformerSize:
    dim, depth, mlp_dim, inner = shape
    if heads is None and head_dim is None:
        head_dim = HEAD_DIM if inner % HEAD_DIM == 0 else inner
        if head_dim == inner and inner > HEAD_DIM:
            raise UsageError(f"the heads of the {side} are {inner} channels together, not of {HEAD_DIM}; give heads")
    heads = inner // int(head_dim) if heads is None else int(heads)
    if not heads or inner % heads or (head_dim is not None and heads * int(head_dim) != inner):
        told = f"heads={heads}" + ("" if head_dim is None else f" and dim_head={head_dim}")
        raise UsageError(f"{told} of the {side} contradict its {inner} channels of all heads together")
    return TransformerSize(dim, depth, heads, mlp_dim, inner // heads)


def _image_size(given: Any, tokens: int, patch: int) -> Size:
    if given is not None:
        size = pair(checked_size("image_size", given))
        if size[0] // patch * (size[1] // patch) != tokens:
            raise UsageError(
                f"image_size={given} has {size[0] // patch}x{size[1] // patch} patches, and there are {tokens}"
            )
        return size
    side = math.isqrt(tokens)
    if side**2 != tokens:
        raise UsageError(f"{tokens} positions are of no square grid; give image_size=(H, W)")
    return side * patch


def _renamed(name: str, patterns: tuple[tuple[str, str], ...]) -> str:
    for pattern, ours in patterns:
        name = re.sub(pattern, ours, name)
    return name


# The discriminator: layers stand in sequences, whose numbers depend on whether there is a blur before.

_LAYER = re.compile(
    r"(?:blocks\.(?P<block>\d+)(?:\.(?P<conv>conv1|conv2|skip))?|(?P<final>final_conv))\.\d+\.(?P<leaf>\w+)"
)


def _discriminator(state: dict[str, Tensor], config: Mapping[str, Any]) -> nn.Module:
    SETTINGS.settle({name: value for name, value in config.items() if name not in ("size", "channel_multiplier")}, {})
    require(state, "blocks.0.0.weight", "blocks.1.conv1.0.weight", "final_conv.0.weight", "final_linear.0.weight")
    blocks = {int(match[1]) for name in state if (match := re.match(r"blocks\.(\d+)\.", name))}
    size = 2 ** (len(blocks) + 1)
    if (told := config.get("size")) is not None and told != size:
        raise UsageError(f"size={told}, and the tensors are of a discriminator of {size} pixels")
    first = state["blocks.0.0.weight"]
    channels = [len(first)]
    for number in range(1, len(blocks)):
        name = next((n for n in state if re.fullmatch(rf"blocks\.{number}\.skip\.\d+\.weight", n)), None)
        if name is None:
            raise UsageError(f"missing: blocks.{number}.skip.1.weight")
        channels.append(len(state[name]))
    model = StyleGANDiscriminator(size, channels=channels, in_chans=first.shape[1])
    tensors, names = {}, {}
    for name, value in state.items():
        ours = _layer(name)
        if ours is None:
            _check_blur(name, value)
            continue
        names[ours] = name
        tensors[ours] = value.flatten() if ours.endswith("bias") else value
    return fill(model, tensors, published=lambda name: names.get(name, name))


def _layer(name: str) -> str | None:
    """Return our name of a tensor; None for the fixed kernel of a blur."""
    if name.startswith("final_linear."):
        return name.replace("final_linear.0", "hidden").replace("final_linear.1", "out")
    match = _LAYER.fullmatch(name)
    if match is None:
        return name  # left over, as `fill` then says
    if match["leaf"] == "kernel":
        return None
    if match["final"]:
        return f"conv.{match['leaf']}"
    if match["conv"] is None:
        return f"stem.{match['leaf']}" if match["block"] == "0" else name
    return f"blocks.{int(match['block']) - 1}.{match['conv']}.{match['leaf']}"


def _check_blur(name: str, kernel: Tensor) -> None:
    taps = torch.tensor(BLUR, dtype=torch.float64)
    expected = torch.outer(taps, taps) / taps.sum() ** 2 if kernel.numel() == 16 else taps
    given = kernel.detach().double().cpu().reshape(expected.shape if kernel.numel() == expected.numel() else -1)
    if given.shape != expected.shape or not torch.allclose(given / given.sum(), expected / expected.sum(), atol=1e-4):
        raise UsageError(f"{name} is another blur than (1, 3, 3, 1), which is all that is computed here")


# Stage 2.

_TRANSFORMER = (
    (r"^tok_emb_cond\.", "cond_embed."),
    (r"^tok_emb_code\.", "code_embed."),
    (r"^pos_emb_cond$", "cond_pos"),
    (r"^pos_emb_code$", "code_pos"),
    (r"^layer_norm\.", "norm."),
    (r"\.ln([12])\.", r".norm\1."),
    (r"\.mlp\.p0\.", ".fc1."),
    (r"\.mlp\.p1\.", ".fc2."),
)


def _transformer(state: dict[str, Tensor], config: Mapping[str, Any]) -> nn.Module:
    state = {n: v for n, v in state.items() if not n.endswith("attn.mask") and not n.endswith("attn_mask")}
    require(state, "tok_emb_cond.weight", "tok_emb_code.weight", "pos_emb_cond", "pos_emb_code")
    require(state, "blocks.0.attn.query.weight", "blocks.0.mlp.p0.weight")
    vocab, dim = state["tok_emb_code.weight"].shape
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    shifted = "blocks.0.attn.time_mix" in state
    inferred = {
        "vocab": vocab,
        "dim": dim,
        "depth": depth,
        "num_classes": len(state["tok_emb_cond.weight"]),
        "num_tokens": state["pos_emb_code"].shape[1],
        "num_cond": state["pos_emb_cond"].shape[1],
        "qkv_bias": "blocks.0.attn.query.bias" in state,
        "mlp_bias": "blocks.0.mlp.p0.bias" in state,
        "token_shift": shifted,
    }
    settled = SETTINGS.settle({"heads": None, **config}, inferred)
    heads = settled.get("num_heads", settled.get("heads", 16))
    model = ImageGPT(
        vocab,
        inferred["num_tokens"],
        dim,
        depth,
        int(heads),
        inferred["num_classes"],
        num_cond=inferred["num_cond"],
        token_shift=shifted,
        mlp="relu2",
        mlp_dim=len(state["blocks.0.mlp.p0.weight"]),
        qkv_bias=bool(inferred["qkv_bias"]),
        mlp_bias=bool(inferred["mlp_bias"]),
    )
    ours = {_renamed(name, _TRANSFORMER): value for name, value in state.items()}
    published = {_renamed(name, _TRANSFORMER): name for name in state}
    return fill(model, ours, published=lambda name: published.get(name, name))
