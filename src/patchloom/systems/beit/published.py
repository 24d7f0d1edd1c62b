"""Published checkpoints of BEiT, BEiT v2 and their tokenizer VQ-KD (github.com/microsoft/unilm, `beit` and `beit2`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from patchloom.encoders import plane_size
from patchloom.errors import UsageError
from patchloom.models.published import fill, has, require
from patchloom.models.published_beit import SETTINGS as OF_ENCODERS
from patchloom.models.published_beit import inferred_from, make_encoder, without_indices
from patchloom.models.published_settings import set_epsilon
from patchloom.systems.beit.saved import VQKDTokenizer
from patchloom.systems.beit.vq_kd import VQKD
from patchloom.systems.ccvit import published as ccvit

OF_VQ_KD = ("quantize.", "encode_task_layer.", "decode_task_layer.")
LEFT_OUT = ("loss", "teacher", "scaling")
"""Beginnings of names that published loading passes over, too: of what training needed."""
OF_VIT = {
    "img_size": "image_size",
    "patch_size": "patch_size",
    "in_chans": "in_chans",
    "embed_dim": "embed_dim",
    "depth": "depth",
    "num_heads": "num_heads",
    "mlp_ratio": "mlp_ratio",
}
SETTINGS = replace(
    OF_ENCODERS,
    obeyed=(*OF_ENCODERS.obeyed, "decoder_num_heads", "beta", "decay"),
    idle=(
        *OF_ENCODERS.idle,
        *("process_type", "quantize_kmeans_init", "kmeans_init", "decoder_image_size", "num_classes", "pretrained"),
        *("teacher_model_type", "as_tokenzer", "as_tokenizer", "smoothing", "use_mean_pooling", "statistic_code_usage"),
    ),
    fixed={**OF_ENCODERS.fixed, "rec_loss_type": ("cosine",)},
    other_names={
        **OF_ENCODERS.other_names,
        "embed_dim": "code_dim",
        "codebook_dim": "code_dim",
        "codebook_emd_dim": "code_dim",
        "n_embed": "num_codes",
        "codebook_n_emd": "num_codes",
        "codebook_size": "num_codes",
        "n_code": "num_codes",
        "decoder_out_dim": "teacher_dim",
        "ema_decay": "decay",
        "decoder_heads": "decoder_num_heads",
        "encoder_heads": "num_heads",
        "encoder_num_heads": "num_heads",
        "encoder_depth": "depth",
    },
    sections={
        "encoder_config": OF_VIT,
        "decoder_config": {
            name: f"decoder_{ours}"
            for name, ours in {**OF_VIT, "qkv_bias": "qkv_bias", "use_abs_pos_emb": "use_abs_pos_emb"}.items()
        },
    },
)


def load(state: Mapping[str, Tensor], **config: Any) -> nn.Module:
    """Return our module with a published state dict in it.

    Args:
        state: Tensors under the published names: of pre-training (with `cls_pt_layers.…` in BEiT v2), of fine-tuning,
            or of VQ-KD (`encoder.…`, `decoder.…`, `quantize.…`).
        **config: What shapes do not tell: of BEiT as for CCViT (`systems.ccvit.published`), `early_layers` among it;
            of VQ-KD `num_heads` and `decoder_num_heads` (64 channels a head by default), `image_size` where it is not
            square, `layer_norm_eps` (1e-6), and of training `beta` (1) and `decay` (0.99); `encoder_config` and
            `decoder_config` as published. What shapes tell may be given and has to agree.

    Returns:
        `CentroidMIM` with a shared head (what `TokenMIM` is) for a pre-training checkpoint, a timm `Beit` with its
        classifier for a fine-tuned one, `VQKDTokenizer` for a tokenizer.

    Raises:
        UsageError: Unknown setting, or tensors missing or left over.
    """
    if has(state, *OF_VQ_KD):
        return load_vq_kd(state, **config)
    if has(state, *ccvit.OWN_HEAD):
        named = next(name for name in state if name.startswith(ccvit.OWN_HEAD))
        raise UsageError(f'the checkpoint has {named}, which BEiT has not; load it by load_reference("ccvit", …)')
    return ccvit.load(state, **config)


def load_vq_kd(state: Mapping[str, Tensor], **config: Any) -> VQKDTokenizer:
    """Return the tokenizer of a published state dict, see `load`."""
    state = {name: value for name, value in state.items() if not name.startswith(LEFT_OUT)}
    needed = [
        f"{side}.{name}"
        for side in ("encoder", "decoder")
        for name in ("patch_embed.proj.weight", "blocks.0.mlp.fc1.weight", "pos_embed")
    ]
    require(state, *needed, "quantize.embedding.weight", "decode_task_layer.2.weight")
    sides = {
        side: without_indices({name.removeprefix(side): v for name, v in state.items() if name.startswith(side)})
        for side in ("encoder.", "decoder.")
    }
    encoder_state, decoder_state = sides["encoder."], sides["decoder."]
    table, out = state["quantize.embedding.weight"], state["decode_task_layer.2.weight"]
    told = inferred_from(encoder_state)
    told |= {f"decoder_{name}": value for name, value in inferred_from(decoder_state).items()}
    told |= {"num_codes": table.shape[0], "code_dim": table.shape[1], "teacher_dim": out.shape[0]}
    config = SETTINGS.settle(config, told)
    pooled = {"global_pool": "avg", "use_fc_norm": True}
    encoder = make_encoder(encoder_state, config, **pooled)
    # The two are of one width where they are published; heads that are named for one are then those of both.
    heads = config.get("decoder_num_heads")
    if heads is None and told["embed_dim"] == told["decoder_embed_dim"]:
        heads = config.get("num_heads")
    grid = plane_size(encoder, "VQ-KD")
    decoder = make_encoder(decoder_state, {"num_heads": heads, "image_size": grid}, **pooled)
    network = VQKD(
        encoder,
        decoder,
        num_codes=table.shape[0],
        teacher_dim=out.shape[0],
        beta=float(config.get("beta", 1.0)),
        decay=float(config.get("decay", 0.99)),
    )
    whole = {f"encoder.{name}": value for name, value in encoder_state.items()}
    whole |= {f"decoder.{name}": value for name, value in decoder_state.items()}
    whole |= {name: value for name, value in state.items() if not name.startswith(("encoder.", "decoder."))}
    fill(network, whole)
    set_epsilon(network, config.get("layer_norm_eps"))
    return VQKDTokenizer(network.eval()).requires_grad_(False)
