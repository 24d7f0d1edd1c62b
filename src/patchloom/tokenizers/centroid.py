"""The centroid tokenizer: an image patch's token is the nearest of K centroids of raw pixel patches.

CCViT, arXiv 2303.04664. A centroid is a class to predict and a patch of pixels to
look at. All images here are RGB (or any `in_chans`) in [0, 1], **not** normalised by mean and standard deviation.

>>> import torch
>>> tokenizer = CentroidTokenizer(torch.tensor([[0.0], [0.5], [1.0]]).expand(3, 48), patch_size=4)
>>> images = torch.rand(2, 3, 8, 16)
>>> ids = tokenizer.encode(images)
>>> ids.shape, tokenizer.decode(ids).shape
(torch.Size([2, 2, 4]), torch.Size([2, 3, 8, 16]))
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from patchloom.base.sizes import Size
from patchloom.encoders.patches import patch_grid, patchify, unpatchify
from patchloom.errors import UsageError
from patchloom.tokenizers.codebook_file import read_codebook, write_codebook
from patchloom.tokenizers.nearest import NearestCentroids, as_float
from patchloom.tokenizers.tokenizer import Tokenizer

if TYPE_CHECKING:
    from patchloom.data.base import Source, StreamSource
    from patchloom.tokenizers.fitting import Progress

# Patches of this many bytes in float32 are searched at once.
_BYTES_AT_ONCE = 2**26


class CentroidTokenizer(Tokenizer):
    """K patches of pixels, and the search for the nearest of them. No parameters to train.

    Args:
        centroids: (K, in_chans * patch_size**2) float, elements in the order channel, row, column; values in [0, 1].
        patch_size: Side of a patch in pixels.
        in_chans: Channels of the images.

    Attributes:
        centroids: The table, float32 buffer.
        counts: (K,) int64, points of every centroid when it was fitted; None when unknown. Saved with the table.
        facts: How it was fitted (plain values; empty when unknown). Saved with the table.

    Raises:
        UsageError: The table's width is not in_chans * patch_size**2, or it holds NaN.
    """

    called = "codebook"
    centroids: Tensor

    def __init__(self, centroids: Tensor, patch_size: int, in_chans: int = 3) -> None:
        super().__init__()
        width = in_chans * patch_size**2
        if centroids.ndim != 2 or centroids.shape[1] != width or not len(centroids):
            raise UsageError(
                f"centroids of shape {tuple(centroids.shape)} do not fit patches of {patch_size} pixels with "
                f"{in_chans} channels; (K, {width}) does"
            )
        if not bool(torch.isfinite(centroids).all()):
            raise UsageError("the centroids hold NaN or infinite values; fit the codebook again")
        self.patch_size, self.in_chans = patch_size, in_chans
        self.counts: Tensor | None = None
        self.facts: dict[str, Any] = {}
        self.register_buffer("centroids", centroids.detach().float().clone().contiguous())
        self._search: NearestCentroids | None = None
        self._search_of: tuple[Any, ...] = ()

    @property
    def num_codes(self) -> int:
        """K, the size of the vocabulary."""
        return len(self.centroids)

    def extra_repr(self) -> str:
        """Return the sizes, for printing."""
        return f"num_codes={self.num_codes}, patch_size={self.patch_size}, in_chans={self.in_chans}"

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Return every patch's token: the index of its nearest centroid in exact float32, of equals the lowest.

        Args:
            images: (B, C, H, W) in [0, 1], any float type, or uint8; H and W divisible by the patch size.

        Returns:
            (B, h, w) int64 on the tokenizer's device.

        Raises:
            UsageError: Values outside [0, 1] or NaN, other channels, a side not divisible by the patch size.
        """
        self.check_images(images)
        h, w = patch_grid((images.shape[2], images.shape[3]), self.patch_size)
        ids = [self.nearest(patches.flatten(0, 1)).view(-1, h, w) for patches in self._patches(images)]
        return torch.cat(ids) if ids else torch.empty(0, h, w, dtype=torch.int64, device=self.centroids.device)

    def decode(self, ids: Tensor) -> Tensor:
        """Return the image made of these tokens' centroids.

        Args:
            ids: (B, h, w) integers from 0 to K - 1.

        Returns:
            (B, C, h * patch_size, w * patch_size) float32 in the centroids' range.

        Raises:
            UsageError: An id outside 0 … K - 1, or no three dimensions.
        """
        self.check_ids(ids)
        patches = self.centroids[ids.flatten(1).to(self.centroids.device)]
        return unpatchify(patches, self.patch_size, (ids.shape[1], ids.shape[2]), self.in_chans)

    @torch.no_grad()
    def replace(self, images: Tensor, mask: Tensor, ids: Tensor | None = None) -> Tensor:
        """Paste over the marked patches their own nearest centroids, as CCViT corrupts images.

        Args:
            images: (B, C, H, W) in [0, 1] or uint8.
            mask: (B, h, w) or (B, h * w) bool, True where to paste.
            ids: (B, h, w) or (B, h * w) tokens of the images where they are known already; else found here.

        Returns:
            (B, C, H, W) float32 in [0, 1] (the input's type if floating), a new tensor.

        Raises:
            UsageError: As `encode`; or mask or ids of another shape than the patch grid.
        """
        self.check_images(images)
        grid = patch_grid((images.shape[2], images.shape[3]), self.patch_size)
        patches = patchify(as_float(images).to(self.centroids.device), self.patch_size)
        marked = self.on_grid(mask, grid, len(images), "mask")
        if marked.dtype != torch.bool:
            raise UsageError(f"a mask is of type bool, not {marked.dtype}")
        if ids is None:
            tokens = self.nearest(patches[marked])
        else:
            self.check_values(ids)
            tokens = self.on_grid(ids, grid, len(images), "ids")[marked]
        patches[marked] = self.centroids[tokens]
        pasted = unpatchify(patches, self.patch_size, grid, self.in_chans)
        return pasted.to(images.dtype) if images.is_floating_point() else pasted

    @torch.no_grad()
    def inertia(self, images: Tensor) -> float:
        """Return the sum over patches of the squared distance to the nearest centroid (float64 sum)."""
        self.check_images(images)
        total = 0.0
        for patches in self._patches(images):
            vectors = as_float(patches.flatten(0, 1).to(self.centroids.device))
            total += float((vectors - self.centroids[self.nearest(vectors)]).square().sum(1).double().sum())
        return total

    @torch.no_grad()
    def squared_error(self, images: Tensor, ids: Tensor) -> float:
        """Return the sum of squared differences between patches and the centroids of ids: of their own, the inertia."""
        self.check_images(images)
        total, rows = 0.0, ids.to(self.centroids.device).flatten(1)
        for patches in self._patches(images):
            vectors = as_float(patches.flatten(0, 1).to(self.centroids.device))
            chosen, rows = rows[: len(patches)].flatten(), rows[len(patches) :]
            total += float((vectors - self.centroids[chosen]).square().sum(1).double().sum())
        return total

    def report(self, images: Tensor) -> dict[str, float | int]:
        """Return how well the codebook covers images.

        Args:
            images: (B, C, H, W) in [0, 1] or uint8.

        Returns:
            `usage`: share of the K codes that occur, 0 … 1; `perplexity`: exp of the tokens' entropy, 1 … K; `psnr` of
            the images made of centroids, in dB (peak 1); `mse` per value; `dead`: codes that do not occur;
            `duplicates`: centroids equal to an earlier one, which are never chosen; `tokens`: patches looked at.
        """
        return super().report(images) | {"duplicates": self.num_duplicates()}

    def num_duplicates(self) -> int:
        """Return how many centroids equal an earlier one; each makes a class that never occurs."""
        return self.num_codes - self._index().num_distinct

    def warn_of_duplicates(self) -> None:
        """Warn where several centroids are the same patch: of equals only the first is ever a token."""
        if duplicates := self.num_duplicates():
            warnings.warn(
                f"{duplicates} of {self.num_codes} centroids equal another one and are never used; the images have "
                f"few different patches, so lower k",
                stacklevel=3,
            )

    @classmethod
    def fit(
        cls,
        source: str | Path | Source | StreamSource | Tensor,
        k: int | None,
        *,
        patch_size: int,
        image_size: Size | None = None,
        images: int | None = None,
        per_class: int | None = None,
        iters: int = 20,
        seed: int = 1,
        max_points: int | None = None,
        init: Literal["random", "kmeans++"] | Tensor = "random",
        backend: Literal["torch", "faiss"] = "torch",
        device: str | torch.device | None = None,
        memory_mb: int = 512,
        distributed: bool = False,
        progress: Progress | None = None,
    ) -> CentroidTokenizer:
        """Make a codebook, on the CPU, by k-means over the patches of images.

        The arguments are those of `fitting.fit_centroids`.

        >>> images = torch.randint(0, 256, (40, 3, 16, 16), dtype=torch.uint8)
        >>> CentroidTokenizer.fit(images, 8, patch_size=4, iters=2)
        CentroidTokenizer(num_codes=8, patch_size=4, in_chans=3)
        """
        from patchloom.tokenizers.fitting import fit_centroids

        result, in_chans, facts = fit_centroids(
            source,
            k,
            patch_size=patch_size,
            image_size=image_size,
            images=images,
            per_class=per_class,
            iters=iters,
            seed=seed,
            max_points=max_points,
            init=init,
            backend=backend,
            device=device,
            memory_mb=memory_mb,
            distributed=distributed,
            progress=progress,
        )
        tokenizer = cls(result.centroids.cpu(), patch_size, in_chans)
        tokenizer.counts, tokenizer.facts = result.counts.cpu(), facts
        tokenizer.warn_of_duplicates()
        return tokenizer

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write the codebook to `.safetensors` (with patch size and the like), `.npy` or `.faiss` (table alone).

        Raises:
            UsageError: Another ending, or the file exists and `overwrite` is not set.
            MissingExtraError: `.faiss` without faiss installed.
        """
        path = Path(path)
        write_codebook(
            path,
            self.centroids,
            patch_size=self.patch_size,
            in_chans=self.in_chans,
            counts=self.counts,
            facts=self.facts,
            overwrite=overwrite,
        )
        return path

    @classmethod
    def load(cls, path: str | Path, *, patch_size: int | None = None, in_chans: int | None = None) -> CentroidTokenizer:
        """Read a codebook: `.safetensors`, the reference's `.npy` or `.faiss`, or a folder `tokenize fit` wrote.

        Args:
            path: The file or folder.
            patch_size: For `.npy` and `.faiss`, which do not say; default: the square that fits the table's width.
            in_chans: Likewise; default 3.

        Raises:
            UsageError: No codebook there, or not of this patch size.
        """
        path = Path(path)
        table, known = read_codebook(path)
        in_chans = in_chans or known.get("in_chans", 3)
        patch_size = patch_size or known.get("patch_size") or math.isqrt(table.shape[1] // in_chans)
        tokenizer = cls(table, patch_size, in_chans)
        tokenizer.counts, tokenizer.facts = known.get("counts"), known.get("facts", {})
        return tokenizer

    def fingerprint(self) -> str:
        """Return 16 hexadecimal digits that change when a centroid, the patch size or the channels do."""
        digest = hashlib.sha256(f"{self.patch_size} {self.in_chans} {self.num_codes} ".encode())
        digest.update(self.centroids.cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    def _index(self) -> NearestCentroids:
        """The search structure, made anew when the table has changed or moved."""
        table = self.centroids
        state = (table.data_ptr(), table._version, table.device)
        if self._search is None or state != self._search_of:
            self._search, self._search_of = NearestCentroids(table), state
        return self._search

    @torch.no_grad()
    def nearest(self, vectors: Tensor) -> Tensor:
        """Return the token of each patch vector: (n, in_chans * patch_size**2) in [0, 1] → (n,) int64."""
        return self._index().search(vectors)

    def _patches(self, images: Tensor) -> Iterator[Tensor]:
        """Yield the patches of some images at a time, as many as memory is granted for."""
        size = images[0].numel() * 4 if len(images) else 1
        for part in images.split(max(_BYTES_AT_ONCE // size, 1)):
            if len(part):
                yield patchify(part, self.patch_size)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the search structure behind: it is large and made again in milliseconds."""
        return {**self.__dict__, "_search": None, "_search_of": ()}
