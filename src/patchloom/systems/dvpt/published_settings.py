"""Settings of DVPT's three backbones: CLIP's visual tower, Swin and SegFormer, each under the names of its own code."""

from __future__ import annotations

from patchloom.models.published_settings import Settings, epsilon_of, name_of

IDLE = (
    *("drop_rate", "attn_drop_rate", "drop_path_rate", "pretrained", "pretrain_img_size", "use_checkpoint", "model"),
    *("frozen_stages", "fused_window_process", "weight_init", "root", "dataset_name", "normalize", "label_fraction"),
    *("num_epochs", "base_lr", "max_epoch", "image_size_of_training", "clip", "init_scale", "dropout_ratio"),
)
OTHER_NAMES = {
    "img_size": "image_size",
    "input_resolution": "image_size",
    "input_size": "image_size",
    "nb_classes": "num_classes",
    "class_num": "num_classes",
    "prompt_num": "num_prompts",
    "num_tokens": "num_prompts",
    "norm_layer": "layer_norm_eps",
}
READ = {"layer_norm_eps": epsilon_of, "act_layer": name_of}

OF_CLIP = Settings(
    obeyed=("num_heads", "share_every", "dynamic", "image_size", "layer_norm_eps"),
    idle=(*IDLE, "window_size"),
    fixed={"act_layer": ("quick_gelu", "quickgelu")},
    other_names={
        **OTHER_NAMES,
        "width": "embed_dim",
        "layers": "depth",
        "heads": "num_heads",
        "output_dim": "projection",
    },
    read=READ,
)
OF_SWIN = Settings(
    obeyed=("num_heads", "window_size", "share_every", "image_size", "layer_norm_eps"),
    idle=(*IDLE, "dynamic"),
    fixed={"qk_scale": (None,), "ape": (False,), "patch_norm": (True,), "act_layer": ("gelu",)},
    other_names=OTHER_NAMES,
    read=READ,
)
OF_SEGFORMER = Settings(
    obeyed=("num_heads", "share_every", "image_size"),
    idle=(*IDLE, "dynamic", "window_size", "patch_size", "feature_strides", "in_index", "layer_norm_eps"),
    fixed={"qk_scale": (None,), "align_corners": (False,)},
    other_names={
        **OTHER_NAMES,
        "embed_dim": "embed_dims",
        "hidden_sizes": "embed_dims",
        "embedding_dim": "decoder_width",
        "decoder_hidden_size": "decoder_width",
        "channels": "decoder_width",
    },
    read=READ,
)
