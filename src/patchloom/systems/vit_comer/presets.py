"""The published models of ViT-CoMer (arXiv 2403.07392), in the words of its configurations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

WINDOWS = (14, 14, None) * 4
"""Of the detection models: windows of 14 tokens in two blocks of three, all tokens in every third."""
TINY = {"embed_dim": 192, "depth": 12, "num_heads": 3, "deform_num_heads": 6, "deform_ratio": 1.0}
SMALL = {"embed_dim": 384, "depth": 12, "num_heads": 6, "deform_num_heads": 6, "deform_ratio": 1.0}
BASE = {"embed_dim": 768, "depth": 12, "num_heads": 12, "deform_num_heads": 12, "deform_ratio": 0.5}
OF_SEGMENTATION = {"flavour": "segmentation", "n_points": 4, "pretrain_size": 224}
OF_DETECTION = {"flavour": "detection", "n_points": 4, "pretrain_size": 592, "window_size": WINDOWS}
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "upernet_t": {**OF_SEGMENTATION, **TINY, "drop_path_rate": 0.1, "dim_ratio": 6.0},
    "upernet_s": {**OF_SEGMENTATION, **SMALL, "drop_path_rate": 0.2, "dim_ratio": 1.5},
    "maskrcnn_s": {**OF_DETECTION, **SMALL, "drop_path_rate": 0.2},
    "maskrcnn_b": {**OF_DETECTION, **BASE, "drop_path_rate": 0.3},
    "segmentation": {"flavour": "segmentation"},
    "detection": {"flavour": "detection"},
}
"""By name; the last two say which version of the code, and nothing of sizes.

The large Mask2Former model stands on a BEiT whose code was not published, and has no checkpoint layout.
"""
