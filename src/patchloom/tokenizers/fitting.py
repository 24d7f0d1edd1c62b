"""From images to a codebook: draw images, cut them into patches, cluster the patches.

As CCViT's published code does: images resized to image_size / 0.875 on the shorter side, centre-cropped,
in [0, 1]; every patch of every drawn image is a point. Patches of uint8 images are held as uint8, in memory while they
fit and in a temporary file beyond.
"""

from __future__ import annotations

import math
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from patchloom.base.sizes import Size, compact, pair
from patchloom.encoders.patches import patch_grid, patchify
from patchloom.errors import MissingExtraError, UsageError, unknown_name
from patchloom.tokenizers.kmeans import MIN_POINTS_PER_CENTROID, KMeansResult, kmeans
from patchloom.tokenizers.nearest import as_float
from patchloom.tokenizers.points import Points, PointsInMemory, PointsOnDisk, Ranks, check_finite

if TYPE_CHECKING:
    from patchloom.data.base import Source, StreamSource

Progress = Callable[[str, int, int, str], None]
"""Called with (what is being done, how much is done, of how much, a remark)."""

_IMAGES_AT_ONCE = 64


def fit_centroids(
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
) -> tuple[KMeansResult, int, dict[str, Any]]:
    """Cluster the patches of images.

    Args:
        source: A data source or its name, or a tensor of images (B, C, H, W), uint8 or float in [0, 1].
        k: Number of centroids; None takes as many as the patches feed, see `default_k`.
        patch_size: Side of a patch in pixels.
        image_size: Images are resized and centre-cropped to this side, or (height, width); None takes them at their
            own size, cropped at the centre to whole patches. Tensors are taken as they are.
        images: Number of images drawn; None takes all.
        per_class: Number of images drawn from each class instead (the paper: 50).
        iters: Iterations of k-means (the paper: 20).
        seed: Of the draw of images and of k-means (the paper: 1).
        max_points: Number of patches to use at most, spread evenly over the images; None uses all.
        init: Start of k-means: "random", "kmeans++" or a (k, d) tensor.
        backend: "torch", or "faiss" (extra): a single process, all patches in memory as float32.
        device: Where to cluster; default: the device of a tensor, else the CPU.
        memory_mb: Mebibytes of patches to hold in memory; more of them go to a temporary file.
        distributed: Share images and work with the other ranks, all of which make this call.
        progress: Called as the work proceeds.

    Returns:
        The result of k-means on (n, C * patch_size**2) patches, C, and facts of the fit: numbers of images, unreadable
        images and patches; the objective of every iteration; of the last assignment the error per value (`mse`, and
        `psnr` in dB), the share of centroids in use and their perplexity; repaired clusters; seconds.

    Raises:
        UsageError: As `kmeans`; or there is no readable image, or an image that gives no patch.
        MissingExtraError: Backend "faiss" without faiss.
    """
    if backend not in ("torch", "faiss"):
        raise unknown_name("k-means backend", backend, ("torch", "faiss"))
    start = time.monotonic()
    with ExitStack() as stack:
        ranks = Ranks(distributed)
        how: dict[str, Any] = {}
        if isinstance(source, Tensor):
            name, in_chans, stream = "tensor", _channels(source), _of_tensor(source, images, seed, ranks)
        else:
            name, in_chans, how, stream = _of_source(source, image_size, patch_size, images, per_class, seed, ranks)
        gathered = _Gathered(in_chans * patch_size**2, memory_mb * 2**20, stack)
        read, skipped, total = 0, 0, 0
        limit = None if max_points is None else ranks.share(max_points)
        for item, total in stream:
            if item is None:
                skipped += 1
            else:
                gathered.add(_patches_of(item, patch_size, _quota(limit, read, total), seed + read))
                read += 1
            if progress is not None and (read + skipped) % _IMAGES_AT_ONCE == 0:
                progress("reading images", read + skipped, total, f"{gathered.count} patches")
        if not ranks.total(read):
            raise UsageError(f"no readable image in {name!r} to fit a codebook on")
        if skipped:
            warnings.warn(f"{skipped} images could not be read and were left out of the codebook", stacklevel=3)
        points = gathered.finish()
        patches = ranks.total(points.shape[0])
        k = default_k(patches) if k is None else k
        result = _cluster(points, patches, k, iters, seed, init, backend, device, distributed, progress)
    mse = result.objective[-1] / (patches * points.shape[1])
    shares = result.counts[result.counts > 0].double() / patches
    facts = {
        "source": name,
        "k": k,
        "patch_size": patch_size,
        "image_size": None if image_size is None else compact(image_size),
        "in_chans": in_chans,
        **({"reading": how} if how else {}),
        "images": ranks.total(read),
        "unreadable": ranks.total(skipped),
        "patches": patches,
        "iters": iters,
        "seed": seed,
        "init": init if isinstance(init, str) else "given",
        "backend": backend,
        "objective": result.objective,
        "mse": mse,
        "psnr": -10 * math.log10(mse) if mse > 0 else None,
        "usage": len(shares) / k,
        "perplexity": float(torch.exp(-(shares * shares.log()).sum())),
        "repaired": result.repaired,
        "seconds": round(time.monotonic() - start, 2),
    }
    return result, in_chans, facts


def default_k(patches: int) -> int:
    """Return the largest power of two up to 8192 (the paper's) that leaves every centroid 39 patches (faiss's rule)."""
    fed = max(patches // MIN_POINTS_PER_CENTROID, 1)
    return min(2 ** (fed.bit_length() - 1), 8192)


def _cluster(
    points: Points,
    patches: int,
    k: int,
    iters: int,
    seed: int,
    init: Any,
    backend: str,
    device: str | torch.device | None,
    distributed: bool,
    progress: Progress | None,
) -> KMeansResult:
    def report(done: int, total: int, objective: float) -> None:
        if progress is not None:
            progress("k-means", done, total, f"mean squared error {objective / (patches * points.shape[1]):.6f}")

    if backend == "torch":
        return kmeans(
            points, k, iters=iters, seed=seed, init=init, device=device, distributed=distributed, progress=report
        )
    if distributed:
        raise UsageError("faiss clusters in one process; use backend='torch' for several ranks")
    return _faiss_kmeans(points, k, iters, seed, init)


def _faiss_kmeans(points: Points, k: int, iters: int, seed: int, init: Any) -> KMeansResult:
    try:
        import faiss
    except ImportError as error:
        raise MissingExtraError("faiss", "faiss", "k-means with backend='faiss'") from error
    n, d = points.shape
    if k > n:
        raise UsageError(f"k = {k} clusters need at least {k} points, but there are {n}; take a smaller k")
    if init == "kmeans++":
        raise UsageError("faiss starts from random points or from a tensor; use backend='torch' for 'kmeans++'")
    matrix = torch.cat([as_float(block).clone() for block in points.blocks(65536)])
    check_finite(matrix, 0)
    clustering = faiss.Kmeans(d, k, niter=iters, seed=seed, max_points_per_centroid=10**7, min_points_per_centroid=1)
    clustering.train(matrix.numpy(), init_centroids=init.numpy() if isinstance(init, Tensor) else None)
    assignment = clustering.index.search(matrix.numpy(), 1)[1][:, 0]
    counts = torch.from_numpy(np.bincount(assignment, minlength=k))
    centroids = torch.from_numpy(np.array(clustering.centroids, dtype=np.float32))
    return KMeansResult(centroids, [float(value) for value in np.asarray(clustering.obj)], counts, 0)


def _of_tensor(images: Tensor, count: int | None, seed: int, ranks: Ranks) -> Iterator[tuple[Tensor | None, int]]:
    """Yield images of a tensor, and how many this rank will see."""
    order = torch.arange(len(images))
    if count is not None and count < len(images):
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:count].sort().values
    mine = order.tensor_split(ranks.world)[ranks.rank].tolist()
    for index in mine:
        yield images[index], len(mine)


def _of_source(
    source: Any,
    image_size: Size | None,
    patch_size: int,
    images: int | None,
    per_class: int | None,
    seed: int,
    ranks: Ranks,
) -> tuple[str, int, dict[str, Any], Iterator[tuple[Tensor | None, int]]]:
    """Return the source's name, its channels, how its pixels are read, its images (None: unreadable), how many."""
    from patchloom.data.base import StreamSource
    from patchloom.data.kinds import require_kind
    from patchloom.data.reading import reading_options
    from patchloom.data.transforms import EvalTransform

    if isinstance(source, str | Path):
        from patchloom.data import open_source

        source = open_source(str(source))
    require_kind(source, ("image",), "a codebook of patches")
    transform: Callable[[Tensor], Tensor] = _WholePatches(patch_size)
    if image_size is not None:
        patch_grid(pair(image_size), patch_size)  # refuse a size that is no multiple before any reading
        resize = EvalTransform(image_size)
        transform = lambda image: resize(image)["image"]  # noqa: E731

    if per_class is not None and isinstance(source, StreamSource):
        source = source.by_index()
    if isinstance(source, StreamSource):
        stream = _of_stream(source, transform, images, seed, ranks)
    else:
        stream = _of_map(source, transform, images, per_class, seed, ranks)
    return source.name, source.in_chans, reading_options(source), stream


def _of_map(
    source: Any,
    transform: Callable[[Tensor], Tensor],
    images: int | None,
    per_class: int | None,
    seed: int,
    ranks: Ranks,
) -> Iterator[tuple[Tensor | None, int]]:
    from patchloom.data import sample_indices
    from patchloom.data.base import UnreadableImageError

    count = len(source) if images is None else min(images, len(source))
    indices = np.array_split(sample_indices(source, count, seed=seed, per_class=per_class), ranks.world)[ranks.rank]

    def read(index: int) -> Tensor | None:
        try:
            return transform(source.read(index).image)
        except UnreadableImageError:
            return None

    # threads: decoding and resizing release the interpreter lock, and nothing has to be sent between processes
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(indices), _IMAGES_AT_ONCE):
            # decoders silence warnings each for itself, which threads undo in the wrong order; this restores them
            with warnings.catch_warnings():
                batch = list(pool.map(read, indices[start : start + _IMAGES_AT_ONCE].tolist()))
            for image in batch:
                yield image, len(indices)


def _of_stream(
    source: StreamSource,
    transform: Callable[[Tensor], Tensor],
    images: int | None,
    seed: int,
    ranks: Ranks,
) -> Iterator[tuple[Tensor | None, int]]:
    from patchloom.data.base import Unreadable

    count = source.num_samples if images is None else min(images, source.num_samples)
    share = -(-count // ranks.world)
    for sample in source.samples(epoch=0, seed=seed, rank=ranks.rank, world_size=ranks.world, count=count):
        yield (None if isinstance(sample, Unreadable) else transform(sample.image)), share


class _WholePatches:
    """Cut the centre out of an image so that it divides into patches."""

    def __init__(self, patch_size: int) -> None:
        self._patch_size = patch_size

    def __call__(self, image: Tensor) -> Tensor:
        height, width = (side // self._patch_size * self._patch_size for side in image.shape[-2:])
        if not height or not width:
            raise UsageError(
                f"an image of {image.shape[-2]}x{image.shape[-1]} pixels is smaller than a patch of "
                f"{self._patch_size}; give image_size"
            )
        top, left = (image.shape[-2] - height) // 2, (image.shape[-1] - width) // 2
        return image[:, top : top + height, left : left + width]


class _Gathered:
    """Patches as they come in: in memory up to a limit, from there on in a temporary file."""

    def __init__(self, width: int, limit: int, stack: ExitStack) -> None:
        self.count = 0
        self._width, self._limit, self._stack = width, limit, stack
        self._blocks: list[Tensor] = []
        self._bytes = 0
        self._file: Any = None
        self._dtype = torch.uint8

    def add(self, patches: Tensor) -> None:
        """Take in patches (n, width), uint8 or float32; where both come, all become float32."""
        if not self.count:
            self._dtype = patches.dtype
        elif patches.dtype != self._dtype:
            patches = as_float(patches)
            self._become_float()
        self.count += len(patches)
        self._bytes += patches.numel() * patches.element_size()
        if self._file is None and self._bytes > self._limit:
            folder = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="patchloom-patches-"))
            self._file = self._stack.enter_context((Path(folder) / "patches.npy").open("wb"))
            self._write_header()
            self._write(*self._blocks)
            self._blocks = []
        if self._file is None:
            self._blocks.append(patches)
        else:
            self._write(patches)

    def finish(self) -> Points:
        """Return the patches; nothing may be added after."""
        if self._file is None:
            empty = torch.empty(0, self._width, dtype=self._dtype)
            return PointsInMemory(torch.cat(self._blocks) if self._blocks else empty)
        self._file.seek(0)
        self._write_header()
        self._file.flush()
        return PointsOnDisk(self._file.name)

    def _become_float(self) -> None:
        """Turn what was taken in as uint8 into float32."""
        if self._dtype != torch.uint8:
            return
        if self._file is not None:
            before = self.finish()
            folder = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="patchloom-patches-"))
            self._file = self._stack.enter_context((Path(folder) / "patches.npy").open("wb"))
            self._dtype = torch.float32
            self._write_header()
            for block in before.blocks(65536):
                self._write(as_float(block))
        self._dtype = torch.float32
        self._blocks = [as_float(block) for block in self._blocks]

    def _write(self, *blocks: Tensor) -> None:
        for block in blocks:
            self._file.write(block.contiguous().cpu().numpy().data)

    def _write_header(self) -> None:
        """Write the header for the present count; numpy pads it so that any count takes the same room."""
        description = np.dtype(np.uint8 if self._dtype == torch.uint8 else np.float32).str
        np.lib.format.write_array_header_1_0(
            self._file, {"descr": description, "fortran_order": False, "shape": (self.count, self._width)}
        )


def _patches_of(image: Tensor, patch_size: int, quota: int | None, seed: int) -> Tensor:
    """Return the image's patches (n, C * patch_size**2), uint8 or float32, at most `quota` of them at random."""
    if image.dtype != torch.uint8:
        image = image.float()
        if image.numel() and not (float(image.min()) >= -1e-3 and float(image.max()) <= 1 + 1e-3):
            raise UsageError(
                f"images to fit a codebook on lie in [0, 1], these reach from {float(image.min()):.4g} to "
                f"{float(image.max()):.4g}, which looks normalised; leave mean/std normalisation out"
            )
    patches = patchify(image[None], patch_size)[0]
    if quota is None or quota >= len(patches):
        return patches
    chosen = torch.randperm(len(patches), generator=torch.Generator().manual_seed(seed))[:quota].sort().values
    return patches[chosen.to(patches.device)]


def _quota(max_points: int | None, number: int, total: int) -> int | None:
    """Return how many patches image `number` of `total` may give, so that all give `max_points` together."""
    if max_points is None:
        return None
    if not total:
        raise UsageError("max_points needs to know the number of images; give images=N for a stream of unknown length")
    return (number + 1) * max_points // total - number * max_points // total


def _channels(images: Tensor) -> int:
    if images.ndim != 4 or not len(images):
        raise UsageError(f"a codebook is fitted on images (B, C, H, W), not on a tensor of shape {tuple(images.shape)}")
    return images.shape[1]
