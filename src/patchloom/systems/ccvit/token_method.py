"""What masked modelling of tokens shares: a frozen tokenizer that the run keeps, and views with block-wise masks.

CCViT (arXiv 2303.04664) and BEiT (arXiv 2106.08254) derive from it.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from patchloom.data.base import Source, StreamSource
from patchloom.data.survey import notice
from patchloom.data.transforms import PairedViews
from patchloom.encoders.masking import BlockMaskGenerator, ReplacementSampler
from patchloom.errors import UsageError
from patchloom.systems.ccvit.config import MaskedTokenOptions
from patchloom.tokenizers.centroid import CentroidTokenizer
from patchloom.tokenizers.commands import ProgressLine
from patchloom.tokenizers.tokenizer import Tokenizer, find_learned, open_tokenizer
from patchloom.training.method import Method

CODEBOOK, LEARNED = "codebook.safetensors", "tokenizer"


class TokenMethod(Method):
    """Training against the tokens of a frozen tokenizer, which is named, or fitted first: centroids of patches.

    Subclasses set these before they call `find_tokenizer`.

    Attributes:
        size: Side of the encoder's patches in pixels.
        channels: Of the images.
        grid: The encoder's patches, down and across.
        tokenizer: What makes tokens.
        tokens_named: Where the tokenizer lies; None: it is fitted.
    """

    config: MaskedTokenOptions
    size: int
    channels: int
    grid: tuple[int, int]
    tokenizer: Tokenizer
    tokens_named: str | None

    def find_tokenizer(self, named: str | None) -> Tokenizer:
        """Return the tokenizer at a place, or an empty codebook of the size that will be fitted.

        Raises:
            UsageError: There is none, or it does not fit encoder, data or settings.
        """
        config = self.config
        self.tokens_named = named
        if config.resume and (kept := _kept(Path(config.out))) is not None:
            return open_tokenizer(kept)
        if named is not None:
            learned = find_learned(named)
            tokenizer = open_tokenizer(codebook_file(named) if learned is None else learned)
            self.check_tokenizer(tokenizer, named)
            if config.k is not None and config.k != tokenizer.num_codes:
                raise UsageError(f"k is {config.k}, but the {tokenizer.called} {named} has {tokenizer.num_codes} codes")
            fitted = (tokenizer.facts.get("reading") or {}).get("value_range", "auto")
            if fitted != config.value_range and "auto" not in (fitted, config.value_range):
                notice(
                    f"the {tokenizer.called} {named} was made on images read by value_range={fitted}, and these are "
                    f"read by {config.value_range}; the same is better for both"
                )
            return tokenizer
        k = self._codebook_size()
        return CentroidTokenizer(torch.zeros(k, self.channels * self.size**2), self.size, self.channels)

    def check_tokenizer(self, tokenizer: Tokenizer, where: str) -> None:
        """Refuse a tokenizer that does not fit; by default one of other patches or channels than the encoder's."""
        tokenizer.check_fits(self.size, self.channels)

    def _codebook_size(self) -> int:
        """Return k: as asked for, or the largest power of two up to 8192 with 39 patches per centroid."""
        config = self.config
        count = len(self.source) if isinstance(self.source, Source) else self.source.num_samples
        patches = min(count, config.codebook_images) * self.grid[0] * self.grid[1]
        if config.k is not None:
            if config.k > patches:
                raise UsageError(
                    f"k is {config.k}, but {config.data} gives only {patches} patches of {self.size} pixels; lower k"
                )
            return config.k
        k = 8192
        while k > 16 and k * 39 > patches:
            k //= 2
        return k

    def prepare(self, source: Source | StreamSource, run_dir: Path) -> None:
        """Fit the codebook, or copy the one named, into the run folder."""
        config = self.config
        path = run_dir / CODEBOOK
        if _kept(run_dir) is not None:
            return
        if self.tokens_named is not None and not isinstance(self.tokenizer, CentroidTokenizer):
            self.tokenizer.save(run_dir / LEARNED)
            return
        if self.tokens_named is None:
            self.tokenizer = CentroidTokenizer.fit(
                source,
                self.tokenizer.num_codes,
                patch_size=self.size,
                image_size=self.input_size,
                iters=config.codebook_iters,
                seed=config.seed + 1,
                images=config.codebook_images,
                device=self.trainer.strategy.root_device,
                progress=ProgressLine(),
            )
        elif isinstance(self.tokenizer, CentroidTokenizer):
            self.tokenizer.warn_of_duplicates()
        self.tokenizer.save(path)

    def load_prepared(self, run_dir: Path) -> None:
        """Load the run's codebook, or its learned tokenizer."""
        self.tokenizer = open_tokenizer(_kept(run_dir) or run_dir / CODEBOOK).to(self.device)


class MaskedViews:
    """Views of an image and the draw of its masks, in the data worker and from the sample's own generator."""

    def __init__(
        self,
        views: PairedViews | None,
        grid: tuple[int, int],
        num_masked: int,
        num_replaced: int,
        min_block: int,
    ) -> None:
        self.views = views
        self.masks = BlockMaskGenerator(grid, num_masked, min_block=min_block)
        self.replacements = ReplacementSampler(num_replaced)

    def __call__(self, image: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        assert self.views is not None
        sample = self.views(image, generator)
        sample["masked"], sample["replaced"] = self.draw(generator)
        return sample

    def draw(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return (h, w) bool masks of hidden and of replaced patches."""
        masked = self.masks(generator)
        return masked, self.replacements(masked, generator)


def mask_counts(grid: tuple[int, int], mask_ratio: float, replace_ratio: float) -> tuple[int, int]:
    """Return how many patches of a grid are hidden and replaced; 75 and 20 of 14x14 at the paper's shares."""
    patches = grid[0] * grid[1]
    masked = round(mask_ratio * patches)
    return masked, min(round(replace_ratio * patches), patches - masked)


def _kept(run_dir: Path) -> Path | None:
    """Return where a run keeps its tokenizer; None where it has none yet."""
    places = (run_dir / LEARNED, run_dir / CODEBOOK)
    return next((place for place in places if place.exists()), None)


def codebook_file(path: str) -> Path:
    """Return the file of a codebook named by its folder or by itself.

    Raises:
        UsageError: There is none.
    """
    named = Path(path)
    file = named / CODEBOOK if named.is_dir() else named
    if not file.exists():
        raise UsageError(
            f"there is no codebook or tokenizer at {file}; make one with: patchloom tokenize fit --out {path}, or: "
            f"patchloom tokenize train"
        )
    return file
