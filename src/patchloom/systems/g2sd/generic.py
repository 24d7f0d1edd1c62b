"""Generic distillation: a small masked autoencoder learns what a large one's decoder holds, without labels.

The first stage of G2SD (Huang et al. 2023, arXiv 2302.14771). Both see the same patches of an image; the student's
decoder has to say what the teacher's holds half-way, for hidden and visible patches alike.

>>> from patchloom.encoders import create_encoder
>>> def autoencoder(width, depth):
...     encoder = create_encoder("vit_tiny_patch16_224", image_size=64, embed_dim=width, depth=depth, num_heads=2)
...     return MaskedAutoencoder(encoder, decoder_dim=32, decoder_depth=depth, decoder_heads=2)
>>> distiller = GenericDistiller(autoencoder(48, 4), autoencoder(32, 2), teacher_decoder_layer=2)
>>> distiller(torch.randn(2, 3, 64, 64))["prediction"].shape
torch.Size([2, 17, 32])
"""

from __future__ import annotations

from typing import Literal

import torch
from timm.layers import Mlp
from torch import Tensor, nn
from torch.nn import functional as F

from patchloom.encoders import embed, embed_dim, run_blocks
from patchloom.encoders.mask_token import MaskTokenEncoder
from patchloom.encoders.masked_autoencoder import MaskedAutoencoder
from patchloom.encoders.patches import one_side
from patchloom.errors import UsageError


class DistilledAutoencoder(nn.Module):
    """A student: a masked autoencoder and two small networks that speak in the teacher's widths.

    Args:
        autoencoder: The student's encoder and decoder.
        teacher_dim: Width of the teacher's encoder.
        teacher_decoder_dim: Width of its decoder.
    """

    def __init__(self, autoencoder: MaskedAutoencoder, teacher_dim: int, teacher_decoder_dim: int) -> None:
        super().__init__()
        self.autoencoder = autoencoder
        width, decoder = embed_dim(autoencoder.encoder), autoencoder.decoder_embed.out_features
        self.encoderfeature_pred = Mlp(width, teacher_dim, teacher_dim)
        self.decoderfeature_pred = Mlp(decoder, teacher_decoder_dim, teacher_decoder_dim)
        # Pixels are not predicted; what would predict them has no part in training.
        for unused in (autoencoder.decoder_norm, autoencoder.decoder_pred):
            unused.requires_grad_(False)

    def forward(
        self, images: Tensor, noise: Tensor | None = None, mask_ratio: float | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return what the student says of the teacher's features.

        Args:
            images: (B, C, H, W) normalised.
            noise: (B, N) numbers that draw the visible patches, see `MaskedAutoencoder`.
            mask_ratio: Share of the patches hidden.

        Returns:
            (B, P + N, D'_T) of the decoder, (B, P + n, D_T) of the encoder, and the mask (B, N), 1 where hidden.
        """
        latent, mask, ids_restore = self.autoencoder.encode(images, mask_ratio, noise)
        hidden = self.autoencoder.decode_hidden(latent, ids_restore)
        return self.decoderfeature_pred(hidden), self.encoderfeature_pred(latent), mask


class GenericDistiller(nn.Module):
    """Teacher and student under the same masks.

    Args:
        teacher: A pre-trained masked autoencoder with its decoder, or an encoder with the mask token it was trained
            with; frozen, in eval mode always.
        student: The one to train, or a `DistilledAutoencoder` made before.
        teacher_decoder_layer: Decoder blocks of the teacher after which its features are taken; paper: 4 of 8. Of an
            encoder with a mask token: blocks of the encoder.
        target: Compare all tokens (paper), or the hidden patches only.
        beta: Where smooth L1 turns from squares to distances.
        encoder_loss_weight: Weight of a loss on the encoders' visible tokens; paper: 0.

    Raises:
        UsageError: Grids that differ, or a decoder layer the teacher does not have.
    """

    def __init__(
        self,
        teacher: MaskedAutoencoder | MaskTokenEncoder,
        student: MaskedAutoencoder | DistilledAutoencoder,
        teacher_decoder_layer: int = 4,
        target: Literal["all", "masked"] = "all",
        beta: float = 2.0,
        encoder_loss_weight: float = 0.0,
    ) -> None:
        super().__init__()
        if target not in ("all", "masked"):
            raise UsageError(f"unknown target {target!r}; use all or masked")
        layers = teacher.hidden_blocks
        if not 1 <= teacher_decoder_layer <= layers:
            raise UsageError(
                f"teacher_decoder_layer is {teacher_decoder_layer}; the teacher's decoder has 1 to {layers}"
            )
        self.teacher = teacher.requires_grad_(False).eval()
        if isinstance(student, MaskedAutoencoder):
            student = DistilledAutoencoder(student, embed_dim(teacher.encoder), teacher.hidden_dim)
        self.student = student
        autoencoder = student.autoencoder
        if teacher.grid != autoencoder.grid or teacher.patch_shape != autoencoder.patch_shape:
            raise UsageError(
                f"the teacher sees {teacher.grid} patches of {one_side(teacher.patch_shape)} pixels and the student "
                f"{autoencoder.grid} of {one_side(autoencoder.patch_shape)}; both need the same image and patch size"
            )
        if teacher.prefix != autoencoder.prefix:
            raise UsageError(
                f"the teacher has {teacher.prefix} class and register tokens and the student "
                f"{autoencoder.prefix}; the features of all tokens are compared, so both need as many"
            )
        self.layer, self.target, self.beta = teacher_decoder_layer, target, beta
        self.encoder_loss_weight = encoder_loss_weight
        if not encoder_loss_weight:
            student.encoderfeature_pred.requires_grad_(False)

    def train(self, mode: bool = True) -> GenericDistiller:
        """Train the student; the teacher stays in eval mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(
        self,
        images: Tensor,
        noise: Tensor | None = None,
        mask_ratio: float = 0.75,
        teacher_images: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Return `loss`, the `prediction` and `target` it compares, and the `mask`.

        Args:
            images: (B, C, H, W) normalised.
            noise: (B, N), given to both; default: drawn.
            mask_ratio: Share of the patches hidden.
            teacher_images: The same images as the teacher wants them normalised; default: `images`.

        Returns:
            `prediction` and `target` are (B, P + N, D'_T), or the (M, D'_T) hidden rows with `target="masked"`.
        """
        if noise is None:
            patches = self.teacher.grid[0] * self.teacher.grid[1]
            noise = torch.rand(len(images), patches, device=images.device)
        shown = images if teacher_images is None else teacher_images
        with torch.no_grad():
            hidden, _ = self.teacher.hidden(shown, mask_ratio, noise, self.layer)
            target = _unit(hidden)
        prediction, encoded, mask = self.student(images, noise, mask_ratio)
        if self.target == "masked":
            rows = mask.bool()
            prediction, target = prediction[:, self.teacher.prefix :][rows], target[:, self.teacher.prefix :][rows]
        prediction = prediction if prediction.dtype == torch.float64 else prediction.float()
        loss = F.smooth_l1_loss(prediction, target, beta=self.beta)
        if self.encoder_loss_weight:
            loss = loss + self.encoder_loss_weight * self._encoder_loss(shown, noise, encoded)
        return {"loss": loss, "prediction": prediction, "target": target, "mask": mask}

    def _encoder_loss(self, images: Tensor, noise: Tensor, prediction: Tensor) -> Tensor:
        """Return the loss on visible tokens, against the teacher's before their norm."""
        with torch.no_grad():
            visible = prediction.shape[1] - self.teacher.prefix
            keep = noise.argsort(dim=1, stable=True)[:, :visible]
            last, _ = run_blocks(self.teacher.encoder, embed(self.teacher.encoder, images, keep=keep))
            target = _unit(last)
        return F.smooth_l1_loss(prediction.to(target.dtype), target, beta=self.beta)


def _unit(x: Tensor) -> Tensor:
    """Return tokens after a layer norm without parameters, in single precision at least."""
    x = x if x.dtype == torch.float64 else x.float()
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)
