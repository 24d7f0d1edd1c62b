"""What training starts from: an encoder by its timm name, or the one of a bundle or run.

>>> start_encoder("vit_tiny_patch16_224", image_size=64).patch_embed.grid_size
(4, 4)
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
from timm.models import adapt_input_conv
from torch import Tensor

from patchloom.encoders import Encoder, Grid, create_encoder, has_tokens, input_size, require_tokens, set_image_size
from patchloom.encoders import in_chans as channels_of
from patchloom.encoders.inflation import inflate
from patchloom.errors import UsageError
from patchloom.models.bundle import fetch_encoder, load


def start_encoder(
    name: str,
    create: Callable[..., Encoder] = create_encoder,
    *,
    image_size: int | Grid | None = None,
    in_chans: int = 3,
    drop_path: float = 0.0,
    **model_args: Any,
) -> Encoder:
    """Return an encoder without head: a fresh one of a timm name, or that of a bundle or run with its weights.

    Args:
        name: A timm model, or the path of a bundle or run.
        create: `create_encoder` for a ViT, `create_backbone` for any image model.
        image_size: Side in pixels, or each: (H, W), of volumes (D, H, W); default: the model's own.
        in_chans: Channels of the images; weights for RGB are adapted to other numbers by timm's rule, and it says so.
        drop_path: Stochastic depth rate of the last block.
        **model_args: Arguments of the timm model, for a fresh one.

    Raises:
        UsageError: Unknown name (with the nearest), a model of another kind, an adapter in place of an encoder, or a
            size, number of channels or rate that does not fit.
    """
    if Path(name).exists():
        return _from_bundle(name, image_size, in_chans, drop_path, create)
    return create(name, image_size=image_size, in_chans=in_chans, drop_path=drop_path, **model_args)


def load_weights(
    encoder: Encoder,
    path: str,
    convert: Callable[[Encoder, dict[str, Tensor]], dict[str, Tensor]] = lambda encoder, saved: saved,
) -> None:
    """Fill an encoder with the weights of a trained one of the same architecture, whose mean and std it takes too.

    Args:
        encoder: What is filled.
        path: The bundle or run; or a timm model, whose published weights are fetched and fitted to the image size.
        convert: Turns its tensors into the encoder's, where they are of another kind.

    Raises:
        UsageError: The tensors do not match, with how many do, or published weights cannot be fetched.
    """
    published = timm.is_model(path) and not Path(path).exists()
    own = input_size(encoder)
    # Weights of images for clips or volumes: at their own size, to be inflated.
    size: dict[str, Any] = {"image_size": own} if len(own) == 2 else {}
    trained = fetch_encoder(path, **size) if published else load(path)
    saved = convert(encoder, trained.state_dict())
    if has_tokens(trained) and len(input_size(trained)) < len(own):
        _inflate(encoder, trained, saved, path)
        return
    if (channels := channels_of(encoder)) != channels_of(trained) == 3:
        saved = widened(saved, trained, channels, path)
    state_dict = encoder.state_dict()
    head = ("head.",)
    usable = {k: v for k, v in saved.items() if k in state_dict and v.shape == state_dict[k].shape}
    missing = [k for k in state_dict if k not in usable and not k.startswith(head)]
    if missing:
        raise UsageError(
            f"{path} fits {len(usable)} of {len(state_dict)} tensors of the encoder; missing or of another shape: "
            f"{', '.join(missing[:5])}{' …' if len(missing) > 5 else ''}; name the architecture and image size it has"
        )
    encoder.load_state_dict(usable, strict=False)
    statistics = {name: trained.pretrained_cfg[name] for name in ("mean", "std") if name in trained.pretrained_cfg}
    encoder.pretrained_cfg = {**encoder.pretrained_cfg, **statistics}


def _inflate(encoder: Encoder, trained: Encoder, saved: dict[str, Tensor], path: str) -> None:
    """Fill an encoder of clips or volumes with the weights of one of images, and say so."""
    if (channels := channels_of(encoder)) != channels_of(trained) == 3:
        saved = widened(saved, trained, channels, path)
    trained.reset_classifier(0)
    told = inflate(trained, encoder, state=saved)
    fresh = f"; fresh: {', '.join(told.fresh[:4])}" if told.fresh else ""
    print(
        f"{path} is an encoder of images: its kernel is repeated along the axis it lacks, over the number of slices "
        f"(mean){fresh}",
        file=sys.stderr,
    )


def _from_bundle(
    path: str,
    size: int | Grid | None,
    in_chans: int,
    drop_path: float,
    create: Callable[..., Encoder],
) -> Encoder:
    saved = load(path)
    if getattr(saved, "active_adapter", None) is not None:
        raise UsageError(f"{path} holds an adapter; give the encoder it extends, or merge them (patchloom merge)")
    if create is create_encoder:
        require_tokens(saved)
    saved.reset_classifier(0)
    state = saved.state_dict()
    if channels_of(saved) != in_chans:
        state = widened(state, saved, in_chans, path)
    creation_args = saved.patchloom_args
    arguments = {
        k: v for k, v in creation_args["model_args"].items() if k not in ("img_size", "in_chans", "num_classes")
    }
    encoder = create(
        creation_args["architecture"],
        image_size=input_size(saved),
        in_chans=in_chans,
        drop_path=drop_path,
        **arguments,
    )
    encoder.pretrained_cfg = saved.pretrained_cfg
    encoder.load_state_dict(state)
    if size is not None:
        set_image_size(encoder, size)
    return encoder


def widened(state: dict[str, Tensor], trained: Encoder, in_chans: int, name: str) -> dict[str, Tensor]:
    """Return the weights of an encoder of RGB images for another number of channels, by timm's rule.

    The weights of red, green and blue are repeated over the channels and scaled to keep the size of the sum; for one
    channel they are summed. Says so on the error stream.

    Args:
        state: The weights.
        trained: The encoder they are of.
        in_chans: Channels wanted.
        name: What the encoder is called.

    Raises:
        UsageError: The encoder takes other than three channels, or its first layer is no convolution of them.
    """
    had = channels_of(trained)
    first = next((key for key, value in state.items() if value.ndim == 4 and value.shape[1] == had), None)
    if had != 3 or first is None:
        raise UsageError(f"the encoder in {name} takes {had} channels, not {in_chans}; set in_chans={had}")
    print(
        f"{name} takes 3 channels: its first layer is adapted to {in_chans} by timm's rule (its weights repeated, or "
        f"summed for one channel)",
        file=sys.stderr,
    )
    return {**state, first: adapt_input_conv(in_chans, state[first])}
