"""A denoiser on disk: a small file that names its encoder; with that, the whole as an ordinary bundle."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import timm
from safetensors.torch import save_file

from patchloom.base.stored import read_tensors
from patchloom.encoders import Encoder, depth, set_image_size
from patchloom.encoders.denoised import Denoiser, denoised
from patchloom.errors import UsageError
from patchloom.io import check_place, make_folder, write_json, written_whole
from patchloom.models.adapters import encoder_hash
from patchloom.models.bundle import LINEAGE, fetch_encoder, save_bundle
from patchloom.models.bundle import load as load_bundle
from patchloom.models.published import fill

WEIGHTS, ABOUT = "denoiser.safetensors", "denoiser.json"
FORMAT = 1
OF_FEATURES = ("encoder", "encoder_hash", "made_from", "layer", "image_size", "mean", "std")


def save_denoiser(denoiser: Denoiser, path: Path, features: dict[str, Any], lineage: dict[str, Any]) -> None:
    """Write a denoiser to a folder.

    Args:
        denoiser: Without an encoder in front.
        path: The folder.
        features: What the index of the first stage says of the features it is for.
        lineage: What made it.
    """
    make_folder(path)
    state = {name: value.detach().cpu().contiguous() for name, value in denoiser.state_dict().items()}
    with written_whole(path / WEIGHTS) as temporary:
        save_file(state, temporary, metadata={"format": "pt"})
    write_json(path / LINEAGE, {"lineage": lineage}, default=str)
    about = {
        "format": FORMAT,
        "feat_dim": denoiser.feat_dim,
        "grid": list(denoiser.grid_size),
        "num_blocks": len(denoiser.blocks),
        "pos_embed": denoiser.pos_embed is not None,
        **{name: features[name] for name in OF_FEATURES},
    }
    write_json(path / ABOUT, about)


def find_denoiser(path: str | Path) -> Path:
    """Return the folder of the denoiser meant by a run or its model.

    Raises:
        UsageError: There is none.
    """
    for folder in (Path(path), Path(path) / "model"):
        if (folder / ABOUT).exists() and (folder / WEIGHTS).exists():
            return folder
    what = "does not exist" if not Path(path).exists() else f"holds no {ABOUT} and {WEIGHTS}"
    raise UsageError(f"there is no denoiser at {path}: it {what}; give a run of patchloom clean dvt train")


def load_denoiser(path: str | Path) -> tuple[Denoiser, dict[str, Any]]:
    """Return the denoiser of a run or its model, in eval mode, and what is known of it.

    Raises:
        UsageError: There is none, or it is damaged.
    """
    folder = find_denoiser(path)
    try:
        about: dict[str, Any] = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        if about["format"] != FORMAT:
            raise UsageError(
                f"{folder / ABOUT} is of format {about['format']}, and this version reads {FORMAT}; update patchloom"
            )
        height, width = about["grid"]
        made = Denoiser(about["feat_dim"], (height, width), about["num_blocks"], about["pos_embed"])
        _ = [about[name] for name in OF_FEATURES]
    except UsageError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{folder / ABOUT} is damaged ({error}); write the run again") from error
    fill(made, read_tensors(folder / WEIGHTS, "train it again"))
    return made.eval(), about


def find_encoder(about: dict[str, Any], encoder: Any = None) -> Encoder:
    """Return the encoder that features are of, set up for their size, in eval mode.

    Args:
        about: What an index or a denoiser says of the features.
        encoder: Where it is now: bundle, run, timm model or module; default: where it was.

    Raises:
        UsageError: It is gone, or another one.
    """
    given = about["encoder"] if encoder is None else encoder
    if isinstance(given, str | Path):
        if Path(given).exists():
            model = load_bundle(given)
        elif timm.is_model(str(given)):
            model = fetch_encoder(str(given)).eval()
        else:
            raise UsageError(
                f"the encoder {about['encoder_hash']} is no longer at {given}; give its place now as encoder"
            )
    else:
        model = copy.deepcopy(given)
    height, width = about["image_size"]
    set_image_size(model, (height, width))
    if (found := encoder_hash(model)) != about["encoder_hash"]:
        raise UsageError(
            f"the features are of the encoder {about['encoder_hash']}, and {_named(given)} is {found}; give the one "
            f"they were made with"
        )
    return model.eval()


def load_denoised(path: str | Path) -> Encoder:
    """Return an encoder with the denoiser of a run or its model behind its norm, in eval mode.

    Raises:
        UsageError: There is no denoiser, or its encoder is another or gone.
    """
    return combined(*load_denoiser(path))


def combined(denoiser: Denoiser, about: dict[str, Any], encoder: Any = None) -> Encoder:
    """Return the encoder of a denoiser with it behind its norm, set up for the size of the features."""
    model = find_encoder(about, encoder)
    layer = int(about["layer"])
    return denoised(model, denoiser, None if layer == depth(model) - 1 else layer).eval()


def write_bundle(run: str | Path, out: str | Path, *, encoder: Any = None, overwrite: bool = False) -> str:
    """Write encoder and denoiser as one bundle; see `commands.apply`."""
    if check_place(out).exists() and not overwrite:
        raise UsageError(f"{out} exists; choose another out, or set overwrite to replace it")
    denoiser, about = load_denoiser(run)
    folder = find_denoiser(run)
    written = json.loads((folder / LINEAGE).read_text(encoding="utf-8")) if (folder / LINEAGE).exists() else {}
    lineage = {
        "made_by": "clean dvt apply",
        "encoder": about["encoder"],
        "from": {"path": str(run), "lineage": written.get("lineage", {})},
    }
    save_bundle(combined(denoiser, about, encoder), out, lineage=lineage, overwrite=overwrite)
    return str(out)


def _named(encoder: Any) -> str:
    return str(encoder) if isinstance(encoder, str | Path) else f"the {type(encoder).__name__} given"
