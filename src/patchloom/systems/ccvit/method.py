"""CCViT as a training method: settings, views and masks, tokens inside the step, pictures.

The algorithm itself is in `centroid_mim`. Paper: "Centroid-centered Modeling for Efficient Vision Transformer
Pre-training", arXiv 2303.04664.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from patchloom.data.base import Source, StreamSource
from patchloom.data.transforms import PairedViews
from patchloom.encoders import Encoder, in_chans, normalize, patch_size, plane_size
from patchloom.encoders.patches import normalize_patches, patchify, unpatchify
from patchloom.errors import UsageError
from patchloom.models.parts import save_parts
from patchloom.systems.ccvit.config import CCViTConfig
from patchloom.systems.ccvit.model import (
    CentroidMIM,
    CentroidMIMLoss,
    MIMOutput,
    initialize_as_beit,
    pixel_targets,
    require_class_token,
)
from patchloom.systems.ccvit.token_method import MaskedViews, TokenMethod, mask_counts
from patchloom.tokenizers.centroid import CentroidTokenizer
from patchloom.tokenizers.tokenizer import Tokenizer
from patchloom.training.method import Transform

if TYPE_CHECKING:
    from patchloom.report import Section

__all__ = [
    "CCViTConfig",
    "CCViTMethod",
    "CentroidMIM",
    "CentroidMIMLoss",
    "MIMOutput",
    "MaskedViews",
    "mask_counts",
    "pixel_targets",
]


class CCViTMethod(TokenMethod):
    """Masked image modelling against a k-means codebook of patches (CCViT)."""

    config_class = CCViTConfig
    config: CCViTConfig

    def __init__(self, config: CCViTConfig, source: Source | StreamSource) -> None:
        super().__init__(config, source)
        require_class_token(self.encoder)
        fresh = config.init_from is None and not Path(config.encoder).exists()
        if fresh:
            initialize_as_beit(self.encoder)
        self.size = patch_size(self.encoder)
        self.channels = in_chans(self.encoder)
        self.grid = plane_size(self.encoder, "block masks")
        self.num_masked, self.num_replaced = mask_counts(self.grid, config.mask_ratio, config.replace_ratio)
        self.tokenizer = self.find_tokenizer(config.codebook)
        # The published model owns encoder and heads; here the encoder is the engine's, and shared.
        self.model = CentroidMIM(
            self.encoder,
            vocab_size=self.tokenizer.num_codes,
            early_layers=config.early_layers,
            head_layers=config.head_layers,
            shared_head=config.shared_head,
            condenser_head="pixels" if config.target in ("dual", "pixel") else "tokens",
            init_condenser=config.init_condenser,
            drop_path=config.drop_path,
        )
        self.loss = CentroidMIMLoss(config.token_weight, config.pixel_weight, config.target)
        if config.target == "pixel":
            # Unused, they would stall processes that wait for their gradients.
            self.model.token_head.requires_grad_(False)
            self.encoder.norm.requires_grad_(False)

    def check_tokenizer(self, tokenizer: Tokenizer, where: str) -> None:
        """Refuse other patches than the encoder's, and a learned tokenizer that lacks what the settings ask for."""
        super().check_tokenizer(tokenizer, where)
        if isinstance(tokenizer, CentroidTokenizer):
            return
        tokenizer.grid_size(self.input_size)
        if self.config.target == "soft_centroid":
            raise UsageError("target=soft_centroid mixes centroids, and a learned tokenizer has none; take target=dual")
        if self.config.replace_ratio and not tokenizer.decodes:
            raise UsageError(
                f"{where} makes no images of tokens, so no patch can be overwritten by its own; set replace_ratio=0"
            )

    def transform(self) -> Transform:
        """Return the paired views and the draw of masks."""
        config = self.config
        views = PairedViews(
            self.input_size,
            scale=config.crop_scale,
            interpolation=config.interpolation,
            second_interpolation=config.target_interpolation,
            flip=config.flip,
            color_jitter=config.color_jitter,
        )
        return MaskedViews(views, self.grid, self.num_masked, self.num_replaced, config.min_block)

    def training_loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return the losses of a batch and the token accuracy, apart for hidden and for replaced patches."""
        images = self.pixels(batch["image"])
        clean = self.pixels(batch["target"]) if "target" in batch else images
        masked, replaced = batch["masked"].flatten(1), batch["replaced"].flatten(1)
        output, ids, pixels = self.predict(images, clean, masked, replaced)
        losses = self.loss(output, ids, pixels, self._centroids())
        with torch.no_grad():
            supervised = self._supervised(masked, replaced)
            right = (output.token_logits.argmax(-1) == ids).float()
            hidden = masked[supervised]
            losses["token_accuracy"] = right.mean()
            losses["masked_token_accuracy"] = _mean_where(right, hidden)
            if self.num_replaced:
                losses["replaced_token_accuracy"] = _mean_where(right, replaced[supervised])
        return losses

    def _centroids(self) -> Tensor | None:
        return self.tokenizer.centroids if isinstance(self.tokenizer, CentroidTokenizer) else None

    def _supervised(self, masked: Tensor, replaced: Tensor) -> Tensor:
        """Return the patches the loss is taken over: masked or replaced, or all with `soft_centroid`."""
        return torch.ones_like(masked) if self.config.target == "soft_centroid" else masked | replaced

    def predict(
        self, images: Tensor, clean: Tensor, masked: Tensor, replaced: Tensor
    ) -> tuple[MIMOutput, Tensor, Tensor]:
        """Corrupt images and predict what was there.

        Args:
            images: (B, C, H, W) in [0, 1], what the encoder is to see.
            clean: The same size, where tokens and pixel targets come from; may be `images` itself.
            masked: (B, N) bool.
            replaced: (B, N) bool, disjoint from `masked`.

        Returns:
            Predictions for the M patches masked or replaced, their tokens (M,), their normalised pixels (M, C p²).
            With `soft_centroid` predictions and targets cover all patches.
        """
        supervised = self._supervised(masked, replaced)
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            patches = patchify(clean, self.size)[supervised]
            if isinstance(self.tokenizer, CentroidTokenizer):
                ids = self.tokenizer.nearest(patches)  # only supervised patches need a token
            else:
                whole = self.tokenizer.encode(clean).flatten(1)
                ids = whole[supervised]
            targets = normalize_patches(patches)
            corrupted = images
            if self.num_replaced:
                if isinstance(self.tokenizer, CentroidTokenizer):
                    # Whole-image ids with the supervised ones filled in: replaced patches are among them.
                    whole = torch.zeros(masked.shape, dtype=torch.int64, device=images.device)
                    whole[supervised] = ids
                known = whole if clean is images else None
                corrupted = self.tokenizer.replace(images, replaced, ids=known)
            inputs = normalize(corrupted, self.encoder)
        return self.model(inputs, masked, targets=supervised), ids, targets

    def summary(self) -> dict[str, Any]:
        """Return the size of the codebook and of the corruption."""
        return {
            "codebook_size": self.tokenizer.num_codes,
            "codebook_fingerprint": self.tokenizer.fingerprint(),
            "masked_patches": self.num_masked,
            "replaced_patches": self.num_replaced,
            "patches": self.grid[0] * self.grid[1],
            "early_layers": self.model.early_layers,
        }

    def save_model(self, model: Encoder, path: Path, lineage: dict[str, Any]) -> None:
        """Write the encoder as a bundle, and the mask token beside it."""
        super().save_model(model, path, lineage)
        if self.config.strategy != "fsdp":
            save_parts(self.model, path)

    def report_sections(self, images: Tensor) -> list[Section]:
        """Return the codebook and what the network makes of corrupted held-out images."""
        from patchloom.report import Section, codebook_mosaic, image_grid

        clean = self.pixels(images).to(self.device)
        generator = torch.Generator().manual_seed(self.config.seed)
        masks = MaskedViews(None, self.grid, self.num_masked, self.num_replaced, self.config.min_block)
        drawn = [masks.draw(generator) for _ in range(len(clean))]
        masked = torch.stack([m for m, _ in drawn]).flatten(1).to(self.device)
        replaced = torch.stack([r for _, r in drawn]).flatten(1).to(self.device)
        self.model.eval()
        rows = {"original": clean, **self._pictures(clean, masked, replaced)}
        codes = self._centroids()
        if codes is None:
            text = f"A learned tokenizer of {self.tokenizer.num_codes} codes: {self.config.codebook}."
            first = Section(title="Tokenizer", text=text)
        else:
            first = Section(
                title="Codebook",
                text=f"The {self.tokenizer.num_codes} centroids of the training patches, sorted by hue: each is a "
                f"class to predict and a patch of pixels.",
                figures=[codebook_mosaic(codes.float().cpu(), self.size, self.channels)],
            )
        return [
            first,
            Section(
                title="Input, target and predicted tokens",
                text=f"Held-out images. Of {masked.shape[1]} patches {self.num_masked} are hidden (grey) and "
                f"{self.num_replaced} overwritten by their centroid. The network predicts pixels up to the brightness "
                f"and contrast of each patch; these are taken from the original here. Patches it was shown are shown.",
                figures=[image_grid({name: row.float().cpu() for name, row in rows.items()})],
            ),
        ]

    def _pictures(self, clean: Tensor, masked: Tensor, replaced: Tensor) -> dict[str, Tensor]:
        """Return the corrupted input, the centroid targets and the predictions as images."""
        supervised = masked | replaced
        patches = patchify(clean, self.size)
        tokens = self.tokenizer.encode(clean)
        rows = {}
        targets = patches
        if self.tokenizer.decodes:
            targets = patchify(self.tokenizer.decode(tokens).clamp(0, 1), self.size)
        corrupted = torch.where(replaced[..., None], targets, patches)
        rows["corrupted input"] = torch.where(masked[..., None], torch.full_like(patches, 0.5), corrupted)
        inputs = normalize(self.tokenizer.replace(clean, replaced) if self.num_replaced else clean, self.encoder)
        output = self.model(inputs, masked, targets=supervised)
        name = "centroid" if isinstance(self.tokenizer, CentroidTokenizer) else "token"
        if self.tokenizer.decodes:
            rows[f"{name} targets"] = targets
        if self.config.target != "pixel" and self.tokenizer.decodes:
            guessed = tokens.flatten(1).clone()
            guessed[supervised] = output.token_logits.argmax(-1)
            decoded = patchify(self.tokenizer.decode(guessed.view_as(tokens)).clamp(0, 1), self.size)
            rows[f"predicted {name}s"] = torch.where(supervised[..., None], decoded.to(patches.dtype), patches)
        if output.pixels is not None:
            variance, mean = torch.var_mean(patches, dim=-1, keepdim=True, correction=1)
            predicted = patches.clone()
            spread = (variance + 1e-6).sqrt()
            predicted[supervised] = output.pixels.to(predicted.dtype) * spread[supervised] + mean[supervised]
            rows["predicted pixels"] = predicted.clamp(0, 1)
        return {name: unpatchify(row, self.size, self.grid, self.channels) for name, row in rows.items()}


def _mean_where(values: Tensor, where: Tensor) -> Tensor:
    """Return the mean of the chosen values; 0 where none is chosen."""
    return (values * where).sum() / where.sum().clamp(min=1)
