"""The masked autoencoder of clips that decodes only some of what it hides: VideoMAE V2.

The encoder sees the tokens of a tenth of the places, the same at all times. The decoder predicts half of all tokens,
chosen without regard to what was hidden: about a tenth of them come twice, as what the encoder made of them and as mask
tokens. Only predictions of hidden tokens carry a loss. "VideoMAE V2: Scaling Video Masked Autoencoders with Dual
Masking", Wang et al. 2023, arXiv 2303.16727.

>>> import torch
>>> from patchloom.encoders import create_encoder
>>> from patchloom.encoders.masking import draw_running_cell_mask, draw_tube_mask
>>> encoder = create_encoder("videomae_tiny_patch16_224", image_size=(8, 64, 64), fc_norm=False)
>>> model = VideoMaskedAutoencoder(encoder, decoder_dim=96, decoder_depth=2, decoder_heads=3)
>>> generator = torch.Generator().manual_seed(0)
>>> hidden = draw_tube_mask(model.grid, 0.75, generator).flatten()[None]
>>> left_out = draw_running_cell_mask(model.grid, 0.5, generator).flatten()[None]
>>> model(torch.randn(1, 3, 8, 64, 64), hidden, left_out).shape  # half of 64 tokens of 2 x 16 x 16 pixels in 3 channels
torch.Size([1, 32, 1536])
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from timm.layers import trunc_normal_
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from patchloom.base.ranges import PositiveInt, checked
from patchloom.encoders import (
    Encoder,
    embed,
    embed_dim,
    family_of,
    final_norm,
    grid_size,
    in_chans,
    kind_of,
    normalize,
    patch_shape,
    run_blocks,
    sides_of,
)
from patchloom.encoders.attend import Group, attend_block
from patchloom.encoders.blocks import run_block
from patchloom.encoders.cosine_attention import CosineAttention
from patchloom.encoders.patches import Grid, patchify
from patchloom.encoders.positions import running_positions
from patchloom.encoders.precision import at_least_float32
from patchloom.errors import UsageError


class VideoMaskedAutoencoder(nn.Module):
    """An encoder of visible tokens and a narrow decoder of some of the others (arXiv 2303.16727, section 3.2).

    Args:
        encoder: Encoder of clips without head and prefix tokens, whose last norm is one of tokens.
        decoder_dim: Width of the decoder.
        decoder_depth: Blocks of the decoder; paper: 4.
        decoder_heads: Attention heads of a decoder block.
        decoder_mlp_ratio: Hidden width of a decoder block's MLP over the decoder's; paper: 4.
        decoder_init_values: Layer scale of decoder blocks at first; 0 for none (paper).
        cos_attn: Attention of the decoder by cosines.
        decoder_qkv_bias: Queries and values of the decoder have a bias; paper: yes.
        normalize_target: Predict each tube normalised by its own mean and deviation in each channel; paper: yes.

    Attributes:
        grid: Tokens of a clip of the encoder's size, (time, down, across); others can be read.

    Raises:
        UsageError: Heads that do not divide the width, an encoder of other things than clips, or one whose blocks need
            the whole grid of tokens.
    """

    decoder_positions: Tensor

    @checked
    def __init__(
        self,
        encoder: Encoder,
        decoder_dim: PositiveInt = 384,
        decoder_depth: PositiveInt = 4,
        decoder_heads: PositiveInt = 6,
        decoder_mlp_ratio: float = 4.0,
        decoder_init_values: float = 0.0,
        cos_attn: bool = False,
        decoder_qkv_bias: bool = True,
        normalize_target: bool = True,
    ) -> None:
        super().__init__()
        if decoder_dim % decoder_heads:
            raise UsageError(f"decoder_dim {decoder_dim} is not divisible by decoder_heads {decoder_heads}")
        if kind_of(encoder) != "clip":
            raise UsageError(
                f"VideoMAE V2 hides tubes of clips, and the encoder takes {kind_of(encoder)}s; take one of clips, such "
                f"as videomae_base_patch16_224, or pretrain mae for images"
            )
        if not family_of(encoder).drops_tokens:
            raise UsageError(
                f"VideoMAE V2 shows the encoder some tokens only, and the blocks of a {type(encoder).__name__} need "
                f"the whole grid; take an encoder with attention alone, such as videomae_base_patch16_224"
            )
        self.encoder = encoder
        self.normalize_target = normalize_target
        self.patch_shape, self.grid, self.in_chans = patch_shape(encoder), grid_size(encoder), in_chans(encoder)
        self.encoder_to_decoder = nn.Linear(embed_dim(encoder), decoder_dim, bias=False)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_dim))
        table = running_positions(math.prod(self.grid), decoder_dim)
        self.register_buffer("decoder_positions", table, persistent=False)
        norm_layer: Any = partial(nn.LayerNorm, eps=1e-6)
        self.decoder_blocks = nn.ModuleList(
            Block(
                decoder_dim,
                decoder_heads,
                mlp_ratio=decoder_mlp_ratio,
                qkv_bias=decoder_qkv_bias,
                init_values=decoder_init_values or None,
                norm_layer=norm_layer,
                attn_layer=CosineAttention if cos_attn else Attention,
            )
            for _ in range(decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(decoder_dim, eps=1e-6)
        self.decoder_head = nn.Linear(decoder_dim, self.in_chans * math.prod(self.patch_shape))
        for part in (self.decoder_blocks, self.decoder_head):
            part.apply(init_layer)
        trunc_normal_(self.mask_token, std=0.02, a=-0.02, b=0.02)

    def forward(self, clips: Tensor, encoder_mask: Tensor, decoder_mask: Tensor | None = None) -> Tensor:
        """Return the predictions of the tokens that are decoded.

        Args:
            clips: (B, C, T, H, W) normalised.
            encoder_mask: (B, N) bool, True where a token is hidden from the encoder; equally many in each clip.
            decoder_mask: (B, N) bool, True where a token is not decoded; equally many in each clip. Default: the
                visible ones, so that all that is hidden is decoded.

        Returns:
            (B, n, 2 p² C), n tokens in their order; the elements of a tube in the order frame, row, column, channel.

        Raises:
            UsageError: Masks of another shape, that differ in number from clip to clip, hide all or decode nothing.
        """
        hidden, left_out = self._masks(clips, encoder_mask, decoder_mask)
        visible, decoded = numbers_of(~hidden, "visible"), numbers_of(~left_out, "decoded")
        latent = self.encode(clips, visible)
        x = self._decoder_input(latent, visible, decoded, hidden.shape[1])
        for block in self.decoder_blocks:
            x = block(x)
        return self._predicted(x[:, visible.shape[1] :])

    def loss(
        self,
        clips: Tensor,
        encoder_mask: Tensor,
        decoder_mask: Tensor | None = None,
        pixels: Tensor | None = None,
        loss_on: str = "hidden",
    ) -> Tensor:
        """Return `dual_mask_loss` of what `forward` predicts, without computing what carries no loss.

        Args:
            clips: (B, C, T, H, W) normalised.
            encoder_mask: See `forward`.
            decoder_mask: See `forward`.
            pixels: The clips in [0, 1]; default: `clips` with the normalisation undone.
            loss_on: `hidden`: decoded tokens that the encoder did not see (paper); `decoded`: all of them.

        Raises:
            UsageError: As `forward`; or nothing that is decoded is hidden.
        """
        hidden, left_out = self._masks(clips, encoder_mask, decoder_mask)
        visible, decoded = numbers_of(~hidden, "visible"), numbers_of(~left_out, "decoded")
        counted = hidden.gather(1, decoded) if loss_on == "hidden" else torch.ones_like(decoded, dtype=torch.bool)
        if not bool(counted.any()):
            raise UsageError("no token that is decoded is hidden, so nothing carries a loss")
        latent = self.encode(clips, visible)
        x = self._decoder_input(latent, visible, decoded, hidden.shape[1])
        for block in list(self.decoder_blocks)[:-1]:
            x = block(x)
        last, count = self.decoder_blocks[-1], visible.shape[1]
        rows = torch.cat([torch.zeros_like(visible, dtype=torch.bool), counted], dim=1)
        if isinstance(last.attn, CosineAttention):
            x = run_block(last, x, rows=rows, keep_all=True)[:, count:]
        else:  # what the last block makes of visible tokens, nobody asks for: they are keys and values only
            x, _ = attend_block(last, Group(x[:, count:]), Group(x[:, :count], is_guest=True))
        predictions = self._predicted(x[counted])  # (tokens of all clips, …)
        values = self._pixels(clips) if pixels is None else pixels
        chosen = patchify(values, self.patch_shape, "hwc").gather(
            1, decoded.unsqueeze(-1).expand(-1, -1, predictions.shape[-1])
        )[counted]
        targets = as_targets(chosen, self.in_chans) if self.normalize_target else at_least_float32(chosen)
        return (at_least_float32(predictions) - targets).square().mean()

    def encode(self, clips: Tensor, visible: Tensor) -> Tensor:
        """Return (B, n, D) after the encoder's norm, of the tokens whose numbers (B, n) are given."""
        last, _ = run_blocks(self.encoder, embed(self.encoder, clips, keep=visible))
        return final_norm(self.encoder, last)

    def decoder_settings(self) -> dict[str, Any]:
        """Return what the tensors of the decoder do not tell, for the file they are kept in."""
        block: Any = self.decoder_blocks[0]
        return {"decoder_heads": int(block.attn.num_heads), "normalize_target": self.normalize_target}

    def targets(self, clips: Tensor) -> Tensor:
        """Return what is to be predicted of all tokens of normalised clips, (B, N, 2 p² C), see `video_targets`."""
        return video_targets(self._pixels(clips), self.patch_shape, self.normalize_target)

    @torch.no_grad()
    def reconstruct(self, pixels: Tensor, encoder_mask: Tensor, decoder_mask: Tensor | None = None) -> Tensor:
        """Return clips with what was predicted in the place of what was hidden and decoded.

        With normalised targets the network says nothing of a tube's brightness and contrast; these are taken from the
        original.

        Args:
            pixels: (B, C, T, H, W) in [0, 1].
            encoder_mask: See `forward`.
            decoder_mask: See `forward`.

        Returns:
            (B, N, 2 p² C) tubes in [0, 1], for `unpatchify` in the order "hwc".
        """
        clips = normalize(pixels, self.encoder)
        hidden, left_out = self._masks(clips, encoder_mask, decoder_mask)
        predictions = at_least_float32(self(clips, hidden, left_out))
        tubes = at_least_float32(patchify(pixels, self.patch_shape, "hwc"))
        decoded = ~left_out
        filled = tubes.clone()
        if self.normalize_target:
            mean, deviation = _moments(tubes[decoded], self.in_chans)
            told = predictions.flatten(0, 1).unflatten(-1, (-1, self.in_chans)) * deviation + mean
            predictions = told.flatten(1).view_as(predictions)
        filled[decoded] = predictions.flatten(0, 1)
        return torch.where((decoded & hidden).unsqueeze(-1), filled, tubes).clamp(0, 1)

    def _decoder_input(self, latent: Tensor, visible: Tensor, decoded: Tensor, tokens: int) -> Tensor:
        """Return (B, n + m, D'): what the encoder made of visible tokens, then a mask token for each decoded one."""
        positions = self.decoder_positions
        if len(positions) != tokens:  # clips of another size than the model was made for
            positions = running_positions(tokens, positions.shape[1]).to(positions)
        seen = self.encoder_to_decoder(latent)
        return torch.cat(
            [seen + positions[visible].to(seen), (self.mask_token + positions[decoded]).to(seen.dtype)], dim=1
        )

    def _predicted(self, x: Tensor) -> Tensor:
        predictions: Tensor = self.decoder_head(self.decoder_norm(x))
        return predictions

    def _pixels(self, clips: Tensor) -> Tensor:
        """Return normalised clips in [0, 1] again."""
        zero, one = (normalize(torch.full_like(clips[:1, :, :1, :1, :1], value), self.encoder) for value in (0.0, 1.0))
        return (clips - zero) / (one - zero)

    def _masks(self, clips: Tensor, encoder_mask: Tensor, decoder_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return both masks (B, N), checked against the clips."""
        if clips.ndim != 5:
            raise UsageError(f"the model takes clips (B, C, T, H, W), and was given shape {tuple(clips.shape)}")
        shape = (len(clips), math.prod(grid_size(self.encoder, sides_of(clips))))
        hidden = _flat(encoder_mask, shape, "encoder_mask")
        return hidden, ~hidden if decoder_mask is None else _flat(decoder_mask, shape, "decoder_mask")


def video_targets(pixels: Tensor, patch: Grid = (2, 16, 16), normalize: bool = True) -> Tensor:
    """Return what is predicted of clips: the pixels of tubes, by default normalised in each tube and channel.

    Args:
        pixels: (B, C, T, H, W) in [0, 1].
        patch: Sides of a tube, (frames, rows, columns).
        normalize: (x - mean) / (unbiased standard deviation + 1e-6), over the pixels of a tube in each channel.

    Returns:
        (B, N, 2 p² C) float32 (float64 stays), elements in the order frame, row, column, channel.
    """
    tubes = patchify(pixels, patch, "hwc")
    return as_targets(tubes, pixels.shape[1]) if normalize else at_least_float32(tubes)


def as_targets(tubes: Tensor, channels: int) -> Tensor:
    """Return tubes (…, p C), channels last, normalised in each channel; a constant one becomes 0."""
    tubes = at_least_float32(tubes)
    mean, deviation = _moments(tubes, channels)
    return ((tubes.unflatten(-1, (-1, channels)) - mean) / deviation).flatten(-2)


def dual_mask_loss(predictions: Tensor, targets: Tensor, encoder_mask: Tensor, decoder_mask: Tensor) -> Tensor:
    """Return the mean squared error over the tokens that are decoded and hidden from the encoder.

    Args:
        predictions: (B, n, E), of the decoded tokens in their order.
        targets: (B, N, E), of all tokens.
        encoder_mask: (B, N) bool, True = hidden.
        decoder_mask: (B, N) bool, True = not decoded; n are decoded in each clip.

    Returns:
        (): the sum over such tokens of all clips over their number.

    Raises:
        UsageError: Another number of predictions than tokens decoded, or none of these is hidden.
    """
    decoded = numbers_of(~decoder_mask, "decoded")
    if decoded.shape[1] != predictions.shape[1]:
        raise UsageError(f"{predictions.shape[1]} tokens are predicted and {decoded.shape[1]} are decoded by the mask")
    counted = encoder_mask.gather(1, decoded)
    if not bool(counted.any()):
        raise UsageError("no token that is decoded is hidden, so nothing carries a loss")
    chosen = targets.gather(1, decoded.unsqueeze(-1).expand(-1, -1, targets.shape[-1]))
    return (at_least_float32(predictions) - chosen).square().mean(-1)[counted].mean()


def numbers_of(chosen: Tensor, what: str) -> Tensor:
    """Return the numbers (B, n) of the tokens chosen in each row of (B, N) bool, ascending.

    Raises:
        UsageError: None is, or another number in one row than in another.
    """
    counts = chosen.sum(1)
    least, most = (int(end) for end in torch.aminmax(counts))
    if least != most:
        raise UsageError(f"the masks of a batch leave {least} to {most} tokens {what}; they must leave equally many")
    if not most:
        raise UsageError(f"the mask leaves no token {what}")
    return chosen.nonzero()[:, 1].view(len(chosen), most)


def initialize_as_videomae(encoder: Encoder) -> None:
    """Initialise a fresh encoder as the published pre-training does: linear weights Xavier-uniform, biases 0."""
    encoder.apply(init_layer)


def init_layer(layer: nn.Module) -> None:
    """Draw a linear layer's weight Xavier-uniform, its bias 0; norms are 1 and 0 as they are."""
    if isinstance(layer, nn.Linear):
        nn.init.xavier_uniform_(layer.weight)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


def _moments(tubes: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """Return mean and deviation (…, 1, C) of tubes (…, p C)."""
    variance, mean = torch.var_mean(tubes.unflatten(-1, (-1, channels)), dim=-2, keepdim=True, correction=1)
    return mean, variance.sqrt() + 1e-6


def _flat(mask: Tensor, shape: tuple[int, int], name: str) -> Tensor:
    """Return a mask (B, N), also where it is given on the grid or once for all clips."""
    flat = mask.bool()
    if flat.numel() == shape[1]:
        flat = flat.reshape(1, shape[1]).expand(shape)
    elif flat.numel() == math.prod(shape):
        flat = flat.reshape(shape)
    if tuple(flat.shape) != shape:
        raise UsageError(f"{name} has shape {tuple(mask.shape)}; one value for each token of each clip is {shape}")
    return flat
