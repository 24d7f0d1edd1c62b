"""Published CCViT checkpoints: pre-training, fine-tuning and the dense model (arXiv 2303.04664)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from timm.models.beit import Beit
from torch import Tensor, nn

from patchloom.errors import UsageError
from patchloom.models.published import fill, has, require
from patchloom.models.published_beit import SETTINGS as OF_ENCODERS
from patchloom.models.published_beit import count, inferred_from, make_encoder, resize, without_indices
from patchloom.models.published_settings import set_epsilon
from patchloom.systems.ccvit.model import CentroidMIM
from patchloom.systems.segmentation_heads import published_dense as dense

SETTINGS = replace(
    OF_ENCODERS,
    obeyed=(*OF_ENCODERS.obeyed, "early_layers"),
    idle=(
        *OF_ENCODERS.idle,
        *("num_mask_patches", "num_replaced_patches", "max_mask_patches_per_block", "min_mask_patches_per_block"),
        *("images_tokens", "centroids_path", "centroid_path", "dual_loss", "use_token_emb", "soft_centroid"),
        *("discrete_vae_type", "discrete_vae_weight_path", "tokenizer_model", "tokenizer_weight"),
        *("codebook_dim", "disable_weight_decay_on_rel_pos_bias", "model_key", "model_prefix"),
        *("kmeans_index", "use_soft_centroid_loss", "use_dual_loss", "num_pixel_mask_patches", "decoupling_aug"),
    ),
    other_names={**OF_ENCODERS.other_names, "shared_lm_head": "shared_head", "codebook_size": "vocab_size"},
)
RENAMED = {
    "mask_token": "mask_token",
    "cls_pt_layers.": "condenser.",
    "cls_pt_norm.": "condenser_norm.",
    "cls_pt_lm_head.": "condenser_head.",
    "lm_head.": "token_head.",
}
OWN_HEAD = ("cls_pt_norm.", "cls_pt_lm_head.")
"""What the condenser has where it doesn't share the token head."""


def load(state: Mapping[str, Tensor], **config: Any) -> nn.Module:
    """Return our module with a published state dict in it.

    Args:
        state: Tensors under the published names.
        **config: `early_layers` (default: the paper's for the depth), and what shapes do not tell: `num_heads`
            (without relative positions), `layer_norm_eps` (1e-6), and `image_size`: (H, W) for a grid that is not
            square, or another size than the checkpoint's, to which positions are then resampled. Shapes tell the rest.
            For a dense model see `published_dense.load` of `segmentation_heads`.

    Returns:
        `CentroidMIM` for a pre-training checkpoint, a timm `Beit` with its classifier for a fine-tuned one; of
        segmentation a `PyramidBackbone`, or with its heads a `SegmentationModel`.

    Raises:
        UsageError: Unknown setting, or tensors missing or left over.
    """
    if dense.is_dense(state):
        return dense.load(state, config)
    for name in ("patch_embed.proj.weight", "blocks.0.mlp.fc1.weight"):
        if name not in state:
            raise UsageError(f"the checkpoint has no {name}, so it is no CCViT encoder")
    state = without_indices(state)
    config = SETTINGS.settle(config, _inferred_from_shapes(state))
    model = _pretrained(state, config) if has(state, "lm_head.", "mask_token") else _finetuned(state, config)
    set_epsilon(model, config.get("layer_norm_eps"))
    if (size := config.get("image_size")) is not None:
        resize(model.encoder if isinstance(model, CentroidMIM) else model, size)
    return model


def _inferred_from_shapes(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the published settings that the tensors themselves tell."""
    pretrained = has(state, "lm_head.", "mask_token")
    return {
        **inferred_from(state),
        "head_layers": count(state, "cls_pt_layers") if pretrained else None,
        "vocab_size": len(state["lm_head.weight"]) if "lm_head.weight" in state else None,
        "num_classes": len(state["head.weight"]) if "head.weight" in state else None,
        "shared_head": not has(state, *OWN_HEAD) if pretrained else None,
        "use_mean_pooling": None if pretrained else has(state, "fc_norm."),
    }


def _pretrained(state: dict[str, Tensor], config: Mapping[str, Any]) -> CentroidMIM:
    own_head = has(state, *OWN_HEAD)
    require(state, "mask_token", "lm_head.weight", *(["cls_pt_lm_head.weight"] if own_head else []))
    encoder = make_encoder(state, config, global_pool="avg", use_fc_norm=False)
    vocab = state["lm_head.weight"].shape[0]
    condenser_outputs = state["cls_pt_lm_head.weight"].shape[0] if own_head else vocab
    pixels = state["patch_embed.proj.weight"][0].numel()
    # A pixel head and a token head of the same size are told apart by nothing; the recipe's is the pixel head.
    head_kind = "pixels" if condenser_outputs == pixels else "tokens"
    model = CentroidMIM(
        encoder,
        vocab_size=vocab,
        early_layers=config.get("early_layers"),
        head_layers=count(state, "cls_pt_layers"),
        shared_head=not own_head,
        condenser_head="pixels" if head_kind == "pixels" else "tokens",
        drop_path=float(config.get("drop_path", 0.0)),
    )
    fill(model, {_our_name(name): value for name, value in state.items()}, published=_published_name)
    return model.eval()


def _finetuned(state: dict[str, Tensor], config: Mapping[str, Any]) -> Beit:
    mean_pooled = has(state, "fc_norm.")
    model: Beit = make_encoder(state, config, global_pool="avg" if mean_pooled else "token", use_fc_norm=mean_pooled)
    if has(state, "head."):
        require(state, "head.weight")
        model.reset_classifier(state["head.weight"].shape[0])
    return fill(model, state).eval()  # type: ignore[return-value]


def _our_name(name: str) -> str:
    for published, ours in RENAMED.items():
        if name.startswith(published):
            return ours + name.removeprefix(published)
    return f"encoder.{name}"


def _published_name(name: str) -> str:
    for published, ours in RENAMED.items():
        if name.startswith(ours):
            return published + name.removeprefix(ours)
    return name.removeprefix("encoder.")
