"""VQ-KD, the tokenizer of BEiT v2: a ViT to codes of a table, and a small one that says a teacher's features of codes.

Peng et al. 2022 (arXiv 2208.06366, section 3.1); follows `beit2/modeling_vqkd.py` of github.com/microsoft/unilm.

>>> model = VQKD.from_shapes("ccvit_tiny_patch8_64", num_codes=16, code_dim=4, teacher_dim=10, kmeans_init=False)
>>> out = model.eval()(torch.rand(2, 3, 64, 64))
>>> out.features.shape, out.ids.shape
(torch.Size([2, 64, 10]), torch.Size([2, 64]))
"""

from __future__ import annotations

from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from timm.models.beit import Beit
from torch import Tensor, nn

from patchloom.base.sizes import Size
from patchloom.encoders import (
    Encoder,
    create_encoder,
    embed,
    embed_dim,
    final_norm,
    in_chans,
    num_prefix_tokens,
    patch_size,
    plane_size,
    run_blocks,
)
from patchloom.encoders.precision import at_least_float32
from patchloom.errors import UsageError
from patchloom.systems.beit.quantizer import EMAVectorQuantizer
from patchloom.systems.vit_vqgan.quantizer import nearest_codes

PLAIN: dict[str, Any] = {
    "init_values": 0.0,  # timm takes None for "as the model has it"
    "use_abs_pos_emb": True,
    "use_rel_pos_bias": False,
    "use_shared_rel_pos_bias": False,
    "global_pool": "avg",
    "use_fc_norm": True,
}
"""What both ViTs are: BEiTs with absolute positions and without layer scale, whose last norm is that behind a pooling;
here it norms each patch."""


class Distilled(NamedTuple):
    """What comes out of the tokenizer's network."""

    features: Tensor
    """(B, N, T): what the decoder says of the teacher's features."""
    loss: Tensor
    """Scalar: that of the quantiser."""
    ids: Tensor
    """(B, N) int64."""
    z_q: Tensor
    """(B, N, d) codes."""
    latents: Tensor
    """(B, N, d) what was quantised, not of length 1 yet."""


class VQKD(nn.Module):
    """Images in [0, 1] to codes of a table, and codes to what a teacher says of the images' patches.

    Args:
        encoder: ViT of the images.
        decoder: ViT with patches of one "pixel" on the encoder's grid, with `code_dim` channels.
        num_codes: K.
        teacher_dim: T, width of the teacher's features.
        beta: Weight of the commitment loss.
        decay: Of the moving averages of the codes.
        kmeans_init: Start the codes from k-means over the first batch.

    Raises:
        UsageError: The grids differ.
    """

    pretrained_cfg: dict[str, Any]

    def __init__(
        self,
        encoder: Encoder,
        decoder: Encoder,
        num_codes: int = 8192,
        teacher_dim: int = 512,
        beta: float = 1.0,
        decay: float = 0.99,
        kmeans_init: bool = True,
    ) -> None:
        super().__init__()
        self.grid = plane_size(encoder, "VQ-KD")
        if (other := plane_size(decoder, "VQ-KD")) != self.grid:
            raise UsageError(
                f"the encoder has {self.grid[0]}x{self.grid[1]} patches, the decoder {other[0]}x{other[1]}; they have "
                f"to be alike"
            )
        self.patch_size, self.in_chans = patch_size(encoder), in_chans(encoder)
        code_dim, width, width_dec = in_chans(decoder), embed_dim(encoder), embed_dim(decoder)
        self.encoder, self.decoder = encoder, decoder
        self.encode_task_layer = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, code_dim))
        self.decode_task_layer = nn.Sequential(
            nn.Linear(width_dec, width_dec), nn.Tanh(), nn.Linear(width_dec, teacher_dim)
        )
        self.quantize = EMAVectorQuantizer(num_codes, code_dim, beta, decay, kmeans_init)
        for layer in (*self.encode_task_layer, *self.decode_task_layer):
            if isinstance(layer, nn.Linear):
                trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    @classmethod
    def from_shapes(
        cls,
        encoder: str,
        image_size: Size | None = None,
        channels: int = 3,
        decoder_layers: int = 1,
        code_dim: int = 32,
        **arguments: Any,
    ) -> VQKD:
        """Return a network whose encoder has the shape of a timm BEiT, and whose decoder has its width.

        Args:
            encoder: Name of the timm model, such as `ccvit_base_patch16_224`; its weights are fresh.
            image_size: Side of the images or (height, width), pixels; default: the model's own.
            channels: Of the images.
            decoder_layers: Blocks of the decoder; paper: 1 or 3.
            code_dim: Length of a code.
            **arguments: Further ones of `VQKD`.

        Raises:
            UsageError: No BEiT, or a size that does not fit.
        """
        if timm.is_model(encoder) and not _is_beit(encoder):
            raise UsageError(f"the tokenizer's encoder is a BEiT, and {encoder} is none; take one such as ccvit_base_*")
        made = create_encoder(encoder, image_size=image_size, in_chans=channels, **PLAIN)
        block: Any = made.blocks[0]
        small = create_encoder(
            "ccvit_base_patch16_224",
            image_size=plane_size(made, "VQ-KD"),
            in_chans=code_dim,
            patch_size=1,
            embed_dim=embed_dim(made),
            depth=decoder_layers,
            num_heads=block.attn.num_heads,
            **PLAIN,
        )
        return cls(made, small, **arguments)

    def arguments(self) -> dict[str, Any]:
        """Return plain values that `from_arguments` makes the same module of."""
        last: Any = self.decode_task_layer[-1]
        return {
            "encoder": self.encoder.patchloom_args,
            "decoder": self.decoder.patchloom_args,
            "num_codes": self.quantize.num_codes,
            "teacher_dim": last.out_features,
            "beta": self.quantize.beta,
            "decay": self.quantize.decay,
        }

    @classmethod
    def from_arguments(cls, arguments: dict[str, Any]) -> VQKD:
        """Return a module of `arguments`, with fresh weights."""
        vits = {}
        for name in ("encoder", "decoder"):
            made_of = dict(arguments[name]["model_args"])
            vits[name] = create_encoder(arguments[name]["architecture"], **made_of)
        return cls(**{**arguments, **vits})

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute blocks once more in the backward pass, which takes less memory."""
        for vit in (self.encoder, self.decoder):
            vit.set_grad_checkpointing(enable)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images in pixels."""
        return self.grid[0] * self.patch_size, self.grid[1] * self.patch_size

    def forward(self, images: Tensor) -> Distilled:
        """Say a teacher's features of images (B, C, H, W) in [0, 1], through codes."""
        latents = self.latents(images)
        z_q, ids, loss = self.quantize(latents)
        return Distilled(self.decode(z_q), loss, ids, z_q, latents)

    def latents(self, images: Tensor) -> Tensor:
        """Return what is quantised, (B, N, d) float32, of images (B, C, H, W) in [0, 1]."""
        features = patch_features(self.encoder, 2 * images - 1)
        with torch.autocast(images.device.type, enabled=False):
            latents: Tensor = self.encode_task_layer(at_least_float32(features))
        return latents

    def decode(self, z_q: Tensor) -> Tensor:
        """Return the teacher's features (B, N, T) that are said of codes (B, N, d)."""
        h, w = self.grid
        features: Tensor = self.decode_task_layer(patch_features(self.decoder, z_q.mT.unflatten(2, (h, w))))
        return features

    @torch.no_grad()
    def encode_ids(self, images: Tensor) -> Tensor:
        """Return (B, N) ids; no code moves, in whichever mode."""
        with torch.autocast(images.device.type, enabled=False):
            return nearest_codes(F.normalize(self.latents(images), dim=-1), self.quantize.embedding.weight)


def patch_features(vit: Encoder, images: Tensor) -> Tensor:
    """Return the patch tokens (B, N, D) of normalised images, each behind the norm that is in front of heads."""
    last, _ = run_blocks(vit, embed(vit, images))
    return final_norm(vit, last)[:, num_prefix_tokens(vit) :]


def cosine_distance(features: Tensor, targets: Tensor) -> Tensor:
    """Return 1 - the cosine of two sets of vectors (..., T), on average; a scalar."""
    similarity = F.cosine_similarity(at_least_float32(features), at_least_float32(targets), dim=-1)
    return 1 - similarity.mean()


def _is_beit(name: str) -> bool:
    """Return whether a timm model is a BEiT, by making one without memory."""
    with torch.device("meta"):
        return isinstance(timm.create_model(name), Beit)
