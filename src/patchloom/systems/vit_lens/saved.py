"""A sense on disk: beside the bundle of the image tower and its texts, what brings the sense there.

`vit_lens.safetensors` holds the encoder of the sense, `vit_lens.json` how it is made; `patchloom.load` gives `ViTLens`.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from patchloom.encoders import embed_dim, num_patches
from patchloom.errors import UsageError
from patchloom.io import write_json, written_whole
from patchloom.systems.clip.model import CLIP
from patchloom.systems.clip.saved import load_clip
from patchloom.systems.vit_lens.lens import PerceiverLens, SelfAttentionLens
from patchloom.systems.vit_lens.model import ModalityEncoder, ViTLens, check_vit
from patchloom.systems.vit_lens.tokenizers import PointTokenizer, SpectrogramTokenizer

WEIGHTS, ABOUT = "vit_lens.safetensors", "vit_lens.json"
FORMAT = 1


class Turned(nn.Module):
    """A spectrogram tokenizer that takes tones by frames, as sources hand them out."""

    def __init__(self, tokenizer: SpectrogramTokenizer) -> None:
        super().__init__()
        self.inner, self.embed_dim, self.num_tokens = tokenizer, tokenizer.embed_dim, tokenizer.num_tokens

    def forward(self, values: torch.Tensor) -> Any:
        """Return the tokens of (B, bins, T)."""
        return self.inner(values.transpose(1, 2))


def build(towers: CLIP, about: dict[str, Any]) -> ModalityEncoder:
    """Return a fresh encoder of a sense before a copy of an image tower.

    Args:
        towers: Of `align clip`.
        about: Settings of `VitLensConfig` by name, and `kind`, that of the samples.

    Raises:
        UsageError: The image tower takes no lens.
    """
    trunk: Any = towers.visual.trunk
    check_vit(trunk)
    width, patches = embed_dim(trunk), num_patches(trunk)
    vit = copy.deepcopy(trunk)
    attention = vit.blocks[0].attn
    heads, dim = int(attention.num_heads), width // int(attention.num_heads)
    kind = about["lens"]
    if about["kind"] == "points":
        token_dim = about["token_dim"] if kind == "perceiver" else width
        tokenizer: nn.Module = PointTokenizer(about["num_groups"], about["group_size"], about["encoder_dim"], token_dim)
    else:
        token_dim = width
        tokenizer = Turned(SpectrogramTokenizer(about["frames"], patch_size=min(16, _patch(vit)), width=width))
    lens: nn.Module | None = None
    if kind == "perceiver":
        lens = PerceiverLens(
            token_dim,
            width,
            about["lens_tokens"] or patches,
            about["lens_depth"],
            about["self_per_cross"],
            cross_head_dim=dim,
            heads=heads,
            head_dim=dim,
            tie_weights=about["tie_weights"],
        )
    elif kind == "self_attention":
        lens = SelfAttentionLens(width, about["lens_depth"], init_from=vit)
    first = about["unlock_first_blocks"] or (about["lens_depth"] if kind == "first_blocks" else 0)
    return ModalityEncoder(
        vit,
        tokenizer,
        lens,
        copy.deepcopy(towers.visual.head),
        unlock_cls=about["unlock_cls"],
        unlock_pos=about["unlock_pos"],
        unlock_first_blocks=min(first, len(vit.blocks) - about["skip_first_blocks"]),
        skip_first_blocks=about["skip_first_blocks"],
    )


def _patch(vit: Any) -> int:
    return int(vit.patch_embed.patch_size[0])


def save_lens(encoder: ModalityEncoder, scale: torch.Tensor, about: dict[str, Any], path: Path) -> None:
    """Write an encoder of a sense into the folder of the bundle of its towers."""
    state = {name: value.detach().cpu().contiguous().clone() for name, value in encoder.state_dict().items()}
    with written_whole(path / WEIGHTS) as temporary:
        save_file(state | {"logit_scale": scale.detach().cpu().clone()}, temporary)
    write_json(path / ABOUT, {"format": FORMAT, **about})


def sized(source: Any, about: dict[str, Any]) -> None:
    """Let a source hand out as many points or frames as the encoder of a sense was made for."""
    if source.kind.name == "points":
        source.num_points = about["num_points"]
    elif hasattr(source, "frames"):
        source.frames = about["frames"]


def find_lens(path: str | Path) -> Path | None:
    """Return the folder of an encoder of a sense, of a run or bundle; None where there is none."""
    return next((folder for folder in (Path(path), Path(path) / "model") if (folder / ABOUT).exists()), None)


def load_lens(path: str | Path) -> ViTLens:
    """Return the towers of a run of align vit_lens, in eval mode; `about` has the settings.

    Raises:
        UsageError: There are none, or their files are damaged.
    """
    folder = find_lens(path)
    if folder is None:
        raise UsageError(f"{path} holds no encoder of a sense; give a run of patchloom align vit_lens")
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        state = load_file(folder / WEIGHTS)
        if about["format"] != FORMAT:
            raise UsageError(f"{folder / ABOUT} is of format {about['format']}, and this version reads {FORMAT}")
        towers = load_clip(folder)
        encoder = build(towers, about)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{folder / ABOUT} or {WEIGHTS} is damaged ({' '.join(str(error).split())[:200]})") from error
    scale = state.pop("logit_scale", torch.tensor(0.0))
    fits = encoder.load_state_dict(state, strict=False)
    if fits.missing_keys or fits.unexpected_keys:
        wrong = [*fits.missing_keys, *fits.unexpected_keys]
        raise UsageError(f"{folder / WEIGHTS} does not fit its settings ({', '.join(wrong[:4])} missing or left over)")
    model = ViTLens(encoder, towers.visual, towers.text)
    model.about, model.towers = about, [towers]
    with torch.no_grad():
        model.logit_scale.copy_(scale)
    return model.eval()
