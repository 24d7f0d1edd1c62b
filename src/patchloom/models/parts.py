"""What masked pre-training trained beside the encoder, on disk: a decoder, or a mask token.

A bundle holds the encoder. What else was trained with it goes into `pretraining.safetensors` in the same folder, for
who wants to predict hidden patches again: G2SD's first stage, whose teacher needs its decoder. The file names the
encoder it belongs to by the hash of its weights.

>>> model = load_masked_model("runs/mae")  # doctest: +SKIP
>>> model.hidden(images, mask_ratio=0.75, num_blocks=4)[0].shape  # doctest: +SKIP
torch.Size([2, 197, 512])
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import timm
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from patchloom.base.stored import read_pickle
from patchloom.encoders import embed_dim
from patchloom.encoders.mask_token import MaskTokenEncoder
from patchloom.encoders.masked_autoencoder import MaskedAutoencoder
from patchloom.errors import UsageError
from patchloom.io import written_whole
from patchloom.models.bundle import bundle_fingerprint, find_bundle, load

PARTS = "pretraining.safetensors"
MaskedModel: TypeAlias = MaskedAutoencoder | MaskTokenEncoder
# What an autoencoder has besides its encoder. The decoder's positions are computed, so files may leave them out.
DECODER = ("decoder_embed", "decoder_blocks", "decoder_norm", "decoder_pred", "mask_token", "decoder_pos_embed")
REMEDY = "give a run of pretrain mae, or a full published checkpoint through: patchloom import mae CHECKPOINT --out DIR"


def save_parts(model: nn.Module, folder: str | Path) -> Path:
    """Write what a masked model has besides its encoder into the folder of the encoder's bundle.

    Args:
        model: A `MaskedAutoencoder`, or a module with an `encoder` and a `mask_token`; or another autoencoder, with an
            `encoder`, `decoder_blocks` and `decoder_settings()`: what its tensors do not tell.
        folder: The bundle.

    Returns:
        The file.
    """
    names = DECODER if isinstance(model, MaskedAutoencoder) else ("mask_token",)
    other = hasattr(model, "decoder_settings")
    state = {
        name: value.detach().cpu().contiguous()
        for name, value in model.state_dict().items()
        if (not name.startswith("encoder.") if other else name.split(".")[0] in names)
    }
    about = {"encoder": bundle_fingerprint(folder), **settings_of(model)}
    target = Path(folder) / PARTS
    with written_whole(target) as temporary:
        save_file(state, temporary, metadata={"about": json.dumps(about)})
    return target


def settings_of(model: nn.Module) -> dict[str, Any]:
    """Return what the tensors of a masked model do not tell."""
    if callable(told := getattr(model, "decoder_settings", None)):
        return {"kind": type(model).__name__, **told()}
    if not isinstance(model, MaskedAutoencoder):
        return {"kind": "mask_token"}
    block: Any = model.decoder_blocks[0]
    return {
        "kind": "autoencoder",
        "decoder_heads": int(block.attn.num_heads),
        "norm_pix_loss": model.norm_pix_loss,
        "mask_ratio": model.mask_ratio,
    }


def load_masked_model(path: str | Path) -> MaskedModel:
    """Return a pre-trained encoder with its decoder, or with its mask token, in eval mode.

    Args:
        path: A run of `pretrain mae`, `pretrain ccvit` or `distill g2sd_generic`, or its bundle, or a bundle made by
            `patchloom import mae` of a checkpoint with its decoder. For runs made before such files were written,
            the parts are taken from `checkpoints/last.ckpt`.

    Raises:
        UsageError: There is no such bundle; neither decoder nor mask token is there; the decoder is incomplete, with
            the names that are missing, or belongs to another encoder.
    """
    name = str(path)
    if not Path(name).exists() and timm.is_model(name):
        raise UsageError(
            f"{name} as timm ships it has no decoder (decoder_embed, decoder_blocks and mask_token are missing), and "
            f"with a random one the teacher would teach noise; {REMEDY}"
        )
    if Path(name).is_file():
        raise UsageError(f"{name} is a file and not a run or bundle; for a checkpoint of MAE: {REMEDY}")
    folder = find_bundle(name)
    state, about = _parts(folder)
    if about["kind"] not in ("autoencoder", "mask_token"):
        raise UsageError(f"the decoder in {path} is one of a {about['kind']}, which is not taken here; {REMEDY}")
    encoder = load(folder)
    encoder.reset_classifier(0)
    if about["kind"] == "mask_token":
        return MaskTokenEncoder(encoder, state["mask_token"]).eval()
    if missing := [part for part in DECODER[:5] if not any(key.split(".")[0] == part for key in state)]:
        raise UsageError(f"the decoder in {path} is incomplete, it lacks {', '.join(missing)}; {REMEDY}")
    width, inner = state["decoder_embed.weight"].shape
    if inner != embed_dim(encoder):
        raise UsageError(f"the decoder in {path} reads {inner} channels and its encoder has {embed_dim(encoder)}")
    model = MaskedAutoencoder(
        encoder,
        decoder_dim=width,
        decoder_depth=len({key.split(".")[1] for key in state if key.startswith("decoder_blocks.")}),
        decoder_heads=int(about["decoder_heads"]),
        norm_pix_loss=bool(about["norm_pix_loss"]),
        mask_ratio=float(about["mask_ratio"]),
    )
    given = model.load_state_dict(state, strict=False)
    missing = [key for key in given.missing_keys if not key.startswith(("encoder.", "decoder_pos_embed"))]
    if missing or given.unexpected_keys:
        listed = ", ".join([*missing, *given.unexpected_keys][:4])
        raise UsageError(f"the decoder in {path} does not fit ({listed} missing or left over); {REMEDY}")
    return model.eval()


def load_mask_token(path: str | Path) -> Tensor | None:
    """Return what stood for hidden patches in front of an encoder's blocks, (…, D), where its bundle has kept that.

    Args:
        path: Run or bundle of the encoder. That of an autoencoder has a mask token of its decoder, which is another.

    Raises:
        UsageError: The file beside the bundle is damaged or belongs to another encoder.
    """
    folder = next((each for each in (Path(path), Path(path) / "model") if (each / PARTS).exists()), None)
    if folder is None:
        return None
    state, about = _parts(folder)
    return state["mask_token"] if about["kind"] == "mask_token" else None


def _parts(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return tensors and settings from the file beside a bundle, or from the checkpoint of its run."""
    file = folder / PARTS
    if not file.exists():
        return _from_checkpoint(folder)
    try:
        with safe_open(file, framework="pt") as opened:
            about = json.loads((opened.metadata() or {})["about"])
            state = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - no mapping
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        raise UsageError(f"{file} is damaged ({error}); write it again, or delete it") from error
    if about.get("encoder") != bundle_fingerprint(folder):
        raise UsageError(f"{file} was trained with another encoder than the one beside it; copy the whole folder again")
    return state, about


def _from_checkpoint(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    run = folder.parent
    checkpoint, settings = run / "checkpoints" / "last.ckpt", run / "config.yaml"
    alone = (
        f"{folder} holds an encoder alone: decoder_embed, decoder_blocks and mask_token are missing, and with random "
        f"ones the teacher would teach noise; {REMEDY}"
    )
    if folder.name != "model" or not checkpoint.exists() or not settings.exists():
        raise UsageError(alone)
    from patchloom.io import read_config

    saved: Mapping[str, Tensor] = read_pickle(checkpoint, mmap=True)["state_dict"]
    encoder_state = {name.removeprefix("model."): value for name, value in saved.items() if name.startswith("model.")}
    state = {name: value.clone() for name, value in encoder_state.items() if name.split(".")[0] in DECODER}
    if "mask_token" not in state:
        raise UsageError(alone)
    config = read_config(settings)
    if "decoder_heads" not in config:
        return {"mask_token": state["mask_token"]}, {"kind": "mask_token"}
    chosen = {name: config[name] for name in ("decoder_heads", "norm_pix_loss", "mask_ratio")}
    return state, {"kind": "autoencoder", **chosen}
