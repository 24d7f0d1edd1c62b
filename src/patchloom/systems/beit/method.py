"""BEiT as a training method: two views of one crop, block-wise masks, tokens inside the step, pictures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from patchloom.base.sizes import pair, size_text
from patchloom.data.base import Source, StreamSource
from patchloom.data.pixels import resize
from patchloom.data.survey import notice
from patchloom.data.transforms import PairedViews
from patchloom.encoders import Encoder, in_chans, normalize, patch_size, plane_size
from patchloom.encoders.patches import patchify, unpatchify
from patchloom.errors import UsageError
from patchloom.models.parts import save_parts
from patchloom.systems.beit.config import BEiTConfig
from patchloom.systems.beit.model import TokenMIM, token_loss
from patchloom.systems.beit.pictures import token_colours
from patchloom.systems.ccvit.model import initialize_as_beit, require_class_token
from patchloom.systems.ccvit.token_method import MaskedViews, TokenMethod, mask_counts
from patchloom.tokenizers.centroid import CentroidTokenizer
from patchloom.tokenizers.tokenizer import Tokenizer
from patchloom.training.method import Transform

if TYPE_CHECKING:
    from patchloom.report import Section


class BEiTMethod(TokenMethod):
    """Masked image modelling against the tokens of any tokenizer (BEiT; preset of BEiT v2).

    Attributes:
        token_size: (height, width) in pixels of the view that tokens are made of.
    """

    config_class = BEiTConfig
    config: BEiTConfig

    def __init__(self, config: BEiTConfig, source: Source | StreamSource) -> None:
        super().__init__(config, source)
        require_class_token(self.encoder)
        if config.init_from is None and not Path(config.encoder).exists():
            initialize_as_beit(self.encoder)
        self.size = patch_size(self.encoder)
        self.channels = in_chans(self.encoder)
        self.grid = plane_size(self.encoder, "block masks")
        self.num_masked, _ = mask_counts(self.grid, config.mask_ratio, 0)
        if not self.num_masked:
            raise UsageError(
                f"mask_ratio {config.mask_ratio:g} hides none of {self.grid[0]}x{self.grid[1]} patches; raise it"
            )
        self.tokenizer = self.find_tokenizer(config.tokenizer)
        self.token_size = self.find_token_size(self.tokenizer)
        self.model = TokenMIM(
            self.encoder,
            vocab_size=self.tokenizer.num_codes,
            head_layers=config.head_layers,
            early_layers=config.early_layers,
            init_condenser=config.init_condenser,
            drop_path=config.drop_path,
        )

    def check_tokenizer(self, tokenizer: Tokenizer, where: str) -> None:
        """Refuse a tokenizer of other channels, or one that cannot give a token for each of the encoder's patches."""
        tokenizer.check_fits(tokenizer.patch_size, self.channels)
        self.find_token_size(tokenizer)

    def find_token_size(self, tokenizer: Tokenizer) -> tuple[int, int]:
        """Return the size of the view a tokenizer sees, so that its tokens are as many as the encoder's patches.

        Raises:
            UsageError: The size asked for gives another grid, or the tokenizer takes no images of such a grid.
        """
        asked = self.config.token_size
        size = tokenizer.image_size(self.grid) if asked is None else pair(asked)
        found = tokenizer.grid_size(size)
        if found != self.grid:
            (h, w), fitting = self.grid, tokenizer.image_size(self.grid)
            raise UsageError(
                f"the {tokenizer.called} makes {found[0]}x{found[1]} tokens of images of {size_text(size)} pixels, and "
                f"the encoder has {h}x{w} patches; token_size={size_text(fitting)} gives as many, and is the default"
            )
        made = tokenizer.facts.get("image_size")
        if made is not None and not isinstance(tokenizer, CentroidTokenizer) and pair(made) != size:
            notice(
                f"the {tokenizer.called} was made on images of {size_text(pair(made))} pixels and sees views of "
                f"{size_text(size)}, for a token for each of the encoder's {found[0]}x{found[1]} patches"
            )
        return size

    def transform(self) -> Transform:
        """Return both views of a crop and the draw of masks."""
        config = self.config
        views = PairedViews(
            self.input_size,
            self.token_size,
            scale=config.crop_scale,
            interpolation=config.interpolation,
            second_interpolation=config.target_interpolation,
            flip=config.flip,
            color_jitter=config.color_jitter,
        )
        return MaskedViews(views, self.grid, self.num_masked, 0, config.min_block)

    def training_loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return the cross-entropy of the hidden patches' tokens, in each branch, and how many were right."""
        images = self.pixels(batch["image"])
        clean = self.pixels(batch["target"]) if "target" in batch else images
        masked = batch["masked"].flatten(1)
        ids = self.tokens_of(clean, masked)
        output = self.model(normalize(images, self.encoder), masked)
        losses = token_loss(output, ids)
        with torch.no_grad():
            losses["token_accuracy"] = (output.token_logits.argmax(-1) == ids).float().mean()
            if output.condenser_logits is not None:
                right = output.condenser_logits.argmax(-1) == ids
                losses["condenser_token_accuracy"] = right.float().mean()
        return losses

    @torch.no_grad()
    def tokens_of(self, clean: Tensor, wanted: Tensor) -> Tensor:
        """Return the tokens (M,) of the wanted patches (B, N), of images of the token size in [0, 1], in float32."""
        with torch.autocast(clean.device.type, enabled=False):
            if isinstance(self.tokenizer, CentroidTokenizer):  # it looks at each patch alone
                return self.tokenizer.nearest(patchify(clean, self.tokenizer.patch_size)[wanted])
            return self.tokenizer.encode(clean).flatten(1)[wanted]

    def summary(self) -> dict[str, Any]:
        """Return what the tokens are of and how much is hidden."""
        figures = {
            "codebook_size": self.tokenizer.num_codes,
            "tokenizer_fingerprint": self.tokenizer.fingerprint(),
            "token_size": list(self.token_size),
            "masked_patches": self.num_masked,
            "patches": self.grid[0] * self.grid[1],
        }
        return figures | ({"early_layers": self.model.early_layers} if self.config.head_layers else {})

    def lineage(self) -> dict[str, Any]:
        """Return which tokenizer made the tokens."""
        named = self.tokens_named or "centroids fitted on the training images"
        return {"tokenizer": {"path": named, "fingerprint": self.tokenizer.fingerprint()}}

    def save_model(self, model: Encoder, path: Path, lineage: dict[str, Any]) -> None:
        """Write the encoder as a bundle, and the mask token beside it."""
        super().save_model(model, path, lineage)
        if self.config.strategy != "fsdp":
            save_parts(self.model, path)

    @torch.no_grad()
    def report_sections(self, images: Tensor) -> list[Section]:
        """Return the vocabulary, and tokens of corrupted held-out images beside those the network says."""
        from patchloom.report import Section, codebook_mosaic, image_grid

        clean = self.pixels(images).to(self.device)
        seen = clean if self.token_size == self.input_size else self._token_view(images)
        generator = torch.Generator().manual_seed(self.config.seed)
        views = MaskedViews(None, self.grid, self.num_masked, 0, self.config.min_block)
        masked = torch.stack([views.draw(generator)[0] for _ in range(len(clean))]).flatten(1).to(self.device)
        self.model.eval()
        tokens = self.tokenizer.encode(seen).flatten(1)
        output = self.model(normalize(clean, self.encoder), masked)
        guessed = tokens.clone()
        guessed[masked] = output.token_logits.argmax(-1)
        right = float((guessed == tokens)[masked].float().mean())
        patches = patchify(clean, self.size)
        grey = torch.where(masked[..., None], torch.full_like(patches, 0.5), patches)
        rows = {"original": clean, "input": unpatchify(grey, self.size, self.grid, self.channels)}
        rows |= {"tokens": self._picture(tokens), "predicted tokens": self._picture(guessed, masked)}
        if self.tokenizer.decodes:
            how = "Tokens are drawn as the pixels they stand for; those of visible patches are their own."
        else:
            how = (
                "This tokenizer makes no pictures of tokens, so each has a colour that means nothing; where the "
                "colours of the last two rows are the same, the token is. What was not hidden is pale."
            )
        size, called = self.tokenizer.num_codes, self.tokenizer.called
        if isinstance(self.tokenizer, CentroidTokenizer):
            mosaic = codebook_mosaic(
                self.tokenizer.centroids.float().cpu(), self.tokenizer.patch_size, self.tokenizer.in_chans
            )
            text = f"The {size} centroids that are the vocabulary, sorted by hue: each is a class to predict."
            first = Section(title="Codebook", text=text, figures=[mosaic])
        else:
            text = f"A learned {called} of {size} codes: {self.tokens_named}, on views of {size_text(self.token_size)}."
            first = Section(title="Tokenizer", text=text)
        return [
            first,
            Section(
                title="Input, tokens and predicted tokens",
                text=f"Held-out images. Of {masked.shape[1]} patches {self.num_masked} are hidden (grey); the network "
                f"says the token of {right:.1%} of them, by chance alone {1 / size:.2%}. {how}",
                figures=[image_grid({name: row.float().cpu() for name, row in rows.items()})],
            ),
        ]

    def _token_view(self, images: Tensor) -> Tensor:
        """Return held-out images at the tokenizer's size, in [0, 1]."""
        interpolation = self.config.target_interpolation
        views = torch.stack([resize(image, self.token_size, interpolation) for image in images])
        return self.pixels(views).to(self.device)

    def _picture(self, ids: Tensor, masked: Tensor | None = None) -> Tensor:
        """Return tokens (n, N) as pictures of the encoder's size: decoded, or as colours, pale where not `masked`."""
        tokens = ids.view(-1, *self.grid)
        if self.tokenizer.decodes:
            decoded = self.tokenizer.decode(tokens).clamp(0, 1)
            return F.interpolate(decoded, self.input_size, mode="bilinear", antialias=True, align_corners=False)
        colours = token_colours(tokens)
        if masked is not None:
            pale = 0.25 * colours + 0.75
            colours = torch.where(masked.view(-1, 1, *self.grid), colours, pale)
        return F.interpolate(colours, self.input_size, mode="nearest")
