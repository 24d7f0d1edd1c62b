"""The centroid tokenizer: nearest centroids by the definition, pasting, figures, files, fitting, and refusals."""

from __future__ import annotations

import copy
import io
import math
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from patchloom.data import open_source
from patchloom.data.base import Sample, Source, UnreadableImageError
from patchloom.errors import MissingExtraError, UsageError
from patchloom.tokenizers.centroid import CentroidTokenizer

pytestmark = pytest.mark.filterwarnings("ignore:.*fewer than 39 each.*")


def patch64(images: torch.Tensor, p: int, b: int, i: int, j: int) -> torch.Tensor:
    """Patch (i, j) of image b as a float64 vector: channel, row, column."""
    return images[b, :, i * p : (i + 1) * p, j * p : (j + 1) * p].double().reshape(-1)


@given(
    h=st.integers(1, 4),
    w=st.integers(1, 4),
    p=st.integers(1, 4),
    chans=st.sampled_from([1, 3, 4]),
    k=st.integers(1, 20),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=30, deadline=None)
def test_tokens_are_nearest_centroids_and_decode_inverts_on_them(h, w, p, chans, k, seed):
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(2, chans, h * p, w * p, generator=generator)
    centroids = torch.rand(k, chans * p * p, generator=generator)
    tokenizer = CentroidTokenizer(centroids, p, chans)
    ids = tokenizer.encode(images)
    assert ids.shape == (2, h, w)
    assert ids.dtype == torch.int64
    total = 0.0
    for b in range(2):
        for i in range(h):
            for j in range(w):
                distance = (patch64(images, p, b, i, j) - centroids.double()).square().sum(1)
                assert distance[ids[b, i, j]] <= distance.min() * (1 + 1e-5) + 1e-12
                total += float(distance.min())
    assert tokenizer.inertia(images) == pytest.approx(total, rel=1e-4, abs=1e-9)
    drawn = tokenizer.decode(ids)
    assert drawn.shape == images.shape
    assert torch.equal(tokenizer.encode(drawn), ids)


def test_uint8_and_half_precision_are_taken():
    tokenizer = CentroidTokenizer(torch.rand(30, 48), 4)
    images = torch.randint(0, 256, (3, 3, 16, 12), dtype=torch.uint8)
    ids = tokenizer.encode(images)
    assert torch.equal(ids, tokenizer.encode(images.float() / 255))
    assert torch.equal(ids, tokenizer.encode(images.double() / 255))
    assert (tokenizer.encode(images.half() / 255) == ids).float().mean() > 0.9


def test_autocast_changes_no_token():
    tokenizer = CentroidTokenizer(torch.rand(200, 192), 8)
    images = torch.rand(4, 3, 32, 32)
    ids = tokenizer.encode(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(tokenizer.encode(images), ids)


def test_batch_size_changes_no_token(monkeypatch):
    tokenizer = CentroidTokenizer(torch.rand(150, 48), 4)
    images = torch.rand(9, 3, 16, 16)
    ids = tokenizer.encode(images)
    monkeypatch.setattr("patchloom.tokenizers.centroid._BYTES_AT_ONCE", 2 * images[0].numel() * 4)
    assert torch.equal(tokenizer.encode(images), ids)
    assert tokenizer.encode(images[:0]).shape == (0, 4, 4)


def test_equal_centroids_take_the_lowest_index_and_are_counted():
    table = torch.rand(6, 12)
    tokenizer = CentroidTokenizer(torch.cat([table, table[:4]]), 2)
    assert tokenizer.num_duplicates() == 4
    assert int(tokenizer.encode(torch.rand(8, 3, 8, 8)).max()) < 6


def test_a_changed_table_is_searched_anew():
    tokenizer = CentroidTokenizer(torch.rand(10, 12), 2)
    images = torch.rand(2, 3, 4, 4)
    tokenizer.encode(images)
    other = torch.rand(10, 12)
    tokenizer.load_state_dict({"centroids": other})
    assert torch.equal(tokenizer.encode(images), CentroidTokenizer(other, 2).encode(images))


def test_replace_pastes_own_centroids_and_nothing_else():
    tokenizer = CentroidTokenizer(torch.rand(40, 48), 4)
    images = torch.rand(3, 3, 12, 20)
    mask = torch.rand(3, 3, 5) < 0.4
    pasted = tokenizer.replace(images, mask)
    pixels = mask.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None].expand_as(images)
    assert torch.equal(pasted[~pixels], images[~pixels])
    ids = tokenizer.encode(images)
    assert torch.equal(pasted[pixels], tokenizer.decode(ids)[pixels])
    assert torch.equal(tokenizer.replace(images, mask.flatten(1), ids), pasted)
    assert torch.equal(tokenizer.replace(images, torch.zeros_like(mask)), images)


def test_report_by_its_formulas():
    tokenizer = CentroidTokenizer(torch.cat([torch.rand(20, 12), torch.full((1, 12), 9.0)]), 2)
    images = torch.rand(5, 3, 8, 8)
    report = tokenizer.report(images)
    counts = np.bincount(tokenizer.encode(images).flatten().numpy(), minlength=21)
    shares = counts[counts > 0] / counts.sum()
    error = np.mean((tokenizer.decode(tokenizer.encode(images)).double() - images.double()).numpy() ** 2)
    assert report["dead"] == int((counts == 0).sum()) >= 1
    assert report["usage"] == pytest.approx((counts > 0).mean())
    assert report["perplexity"] == pytest.approx(math.exp(-(shares * np.log(shares)).sum()))
    assert report["psnr"] == pytest.approx(-10 * math.log10(error), rel=1e-5)
    assert report["tokens"] == 5 * 16


@pytest.mark.parametrize("suffix", [".safetensors", ".npy", ".faiss"])
def test_saved_and_loaded_is_the_same(tmp_path: Path, suffix: str):
    if suffix == ".faiss":
        pytest.importorskip("faiss")
    tokenizer = CentroidTokenizer(torch.rand(30, 64 * 4), 8, in_chans=4)
    tokenizer.facts = {"images": 5}
    path = tokenizer.save(tmp_path / f"deep/book{suffix}")
    loaded = CentroidTokenizer.load(path, in_chans=None if suffix == ".safetensors" else 4)
    assert loaded.fingerprint() == tokenizer.fingerprint()
    assert (loaded.patch_size, loaded.in_chans) == (8, 4)
    assert loaded.facts == ({"images": 5} if suffix == ".safetensors" else {})
    with pytest.raises(UsageError, match="exists"):
        tokenizer.save(path)
    assert tokenizer.save(path, overwrite=True) == path
    assert [item.name for item in path.parent.iterdir()] == [path.name], "no partial file is left"


def test_loading_refuses_what_is_no_codebook(tmp_path: Path):
    with pytest.raises(UsageError, match="no codebook at"):
        CentroidTokenizer.load(tmp_path)
    (tmp_path / "book.pt").write_bytes(b"pickled")
    with pytest.raises(UsageError, match=r"ends in \.safetensors"):
        CentroidTokenizer.load(tmp_path / "book.pt")
    (tmp_path / "a.safetensors").write_bytes(b"garbage")
    with pytest.raises(UsageError, match="is damaged or no codebook"):
        CentroidTokenizer.load(tmp_path / "a.safetensors")
    np.save(tmp_path / "objects.npy", np.array([{"a": 1}], dtype=object))
    with pytest.raises(UsageError, match="is damaged or no codebook"):
        CentroidTokenizer.load(tmp_path / "objects.npy")
    np.save(tmp_path / "wide.npy", np.zeros((4, 50), np.float32))
    with pytest.raises(UsageError, match=r"\(4, 50\) do not fit patches of 4"):
        CentroidTokenizer.load(tmp_path / "wide.npy")


def test_faiss_missing_names_the_extra(tmp_path: Path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    with pytest.raises(MissingExtraError, match=r"patchloom\[faiss\]"):
        CentroidTokenizer(torch.rand(3, 12), 2).save(tmp_path / "a.faiss")


def test_copies_and_pickles_work():
    tokenizer = CentroidTokenizer(torch.rand(30, 12), 2)
    images = torch.rand(2, 3, 4, 4)
    ids = tokenizer.encode(images)
    for twin in (copy.deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer))):
        assert torch.equal(twin.encode(images), ids)
    assert list(tokenizer.state_dict()) == ["centroids"]
    assert list(tokenizer.parameters()) == []


def test_fingerprint_knows_what_matters():
    table = torch.rand(5, 48)
    prints = {
        CentroidTokenizer(table, 4, 3).fingerprint(),
        CentroidTokenizer(table, 2, 12).fingerprint(),
        CentroidTokenizer(table + 1e-6, 4, 3).fingerprint(),
    }
    assert len(prints) == 3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: t.encode(torch.randn(1, 3, 8, 8) * 2), "looks normalised"),
        (lambda t: t.encode(torch.full((1, 3, 8, 8), torch.nan)), "in \\[0, 1\\]"),
        (lambda t: t.encode(torch.rand(1, 1, 8, 8)), r"\(B, 3, H, W\)"),
        (lambda t: t.encode(torch.rand(1, 3, 9, 8)), "9 is not divisible by patch size 4; use 8 or 12"),
        (lambda t: t.decode(torch.tensor([[[5]]])), "has 0 to 4"),
        (lambda t: t.decode(torch.tensor([[[-1]]])), "has 0 to 4"),
        (lambda t: t.decode(torch.zeros(2, 4, dtype=torch.int64)), r"\(B, h, w\)"),
        (lambda t: t.replace(torch.rand(1, 3, 8, 8), torch.ones(1, 3, 2, dtype=torch.bool)), "mask of shape"),
        (lambda t: t.replace(torch.rand(1, 3, 8, 8), torch.ones(1, 2, 2)), "type bool"),
        (lambda t: t.check_fits(16, 3), "codebook is of patch size 4, the encoder of patch size 16"),
        (lambda t: t.check_fits(4, 1), "3 channels, the encoder takes 1"),
        (lambda t: CentroidTokenizer(torch.rand(5, 47), 4), r"\(K, 48\) does"),
        (lambda t: CentroidTokenizer(torch.full((5, 48), torch.nan), 4), "NaN"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(UsageError, match=message):
        call(CentroidTokenizer(torch.rand(5, 48), 4))


class Drawn(Source):
    """Images of odd sizes in two classes, one of them broken."""

    def __init__(self, count: int = 24) -> None:
        self.name, self.class_names = "drawn", ["a", "b"]
        self.labels = np.arange(count) % 2
        self.read_indices: list[int] = []

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> Sample:
        self.read_indices.append(index)
        if index == 3:
            raise UnreadableImageError("3", "broken")
        generator = torch.Generator().manual_seed(index)
        image = torch.randint(0, 256, (3, 20 + index, 41), generator=generator, dtype=torch.uint8)
        return Sample(image, int(self.labels[index]), str(index))

    def key(self, index: int) -> str:
        return str(index)

    def fingerprint(self) -> str:
        return "drawn"


def test_fit_on_a_source_reads_skips_and_counts():
    source = Drawn()
    with pytest.warns(UserWarning, match="1 images could not be read"):
        tokenizer = CentroidTokenizer.fit(source, 10, patch_size=8, image_size=16, iters=3)
    assert tokenizer.facts["images"] == 23
    assert tokenizer.facts["unreadable"] == 1
    assert tokenizer.facts["patches"] == 23 * 4
    assert sorted(source.read_indices) == list(range(24))


def test_fit_at_native_size_and_per_class():
    whole = CentroidTokenizer.fit(Drawn(3), 5, patch_size=8, iters=2)
    assert whole.facts["patches"] == (2 * 5) * 3  # 20, 21, 22 by 41 pixels
    few = CentroidTokenizer.fit(Drawn(), 4, patch_size=8, image_size=16, iters=2, per_class=2, seed=2)
    assert few.facts["images"] + few.facts["unreadable"] == 4


def test_fit_through_a_file_equals_fit_in_memory():
    images = torch.randint(0, 256, (60, 3, 16, 16), dtype=torch.uint8)
    seen: list[str] = []
    kwargs = {"patch_size": 4, "iters": 3, "seed": 7}
    memory = CentroidTokenizer.fit(images, 12, **kwargs, progress=lambda *news: seen.append(news[0]))
    file = CentroidTokenizer.fit(images, 12, **kwargs, memory_mb=0)
    floats = CentroidTokenizer.fit(images.float() / 255, 12, **kwargs)
    assert torch.equal(memory.centroids, file.centroids)
    assert torch.equal(memory.centroids, floats.centroids)
    assert seen == ["k-means"] * 3
    assert memory.facts["mse"] == pytest.approx(memory.facts["objective"][-1] / (60 * 16 * 48))


def test_fit_limits_points_and_images():
    images = torch.rand(30, 3, 16, 16)
    limited = CentroidTokenizer.fit(images, 5, patch_size=4, iters=1, images=10, max_points=77)
    assert limited.facts["images"] == 10
    assert limited.facts["patches"] == 77


def test_fit_with_faiss_agrees():
    pytest.importorskip("faiss")
    images = torch.rand(40, 3, 16, 16)
    start = torch.rand(8, 48)
    ours, theirs = (
        CentroidTokenizer.fit(images, 8, patch_size=4, iters=4, init=start, backend=backend)
        for backend in ("torch", "faiss")
    )
    assert ours.facts["objective"] == pytest.approx(theirs.facts["objective"], rel=1e-3)
    torch.testing.assert_close(ours.centroids, theirs.centroids, atol=1e-2, rtol=0)


@pytest.mark.parametrize(
    ("source", "changes", "message"),
    [
        (torch.rand(2, 3, 8, 8), {"k": 9}, "k = 9 .* there are 8"),
        (torch.zeros(4, 3, 8, 8), {"k": 2}, "only 1 of the 16 points differ"),
        (torch.randn(2, 3, 8, 8), {}, "looks normalised"),
        (torch.rand(2, 3, 10, 8), {}, "not divisible by patch size 4"),
        (torch.rand(3, 8, 8), {}, "images \\(B, C, H, W\\)"),
        (torch.rand(2, 3, 8, 8), {"backend": "sklearn"}, "unknown k-means backend"),
        (Drawn(4), {"image_size": 18}, "18 is not divisible by patch size 4"),
    ],
)
def test_fit_refusals(source, changes, message):
    with pytest.raises(UsageError, match=message):
        CentroidTokenizer.fit(source, **({"k": 2, "patch_size": 4} | changes))


def test_images_of_shards_are_drawn_by_class(tmp_path):
    pytest.importorskip("webdataset")
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for number in range(12):
            buffer = io.BytesIO()
            pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(buffer, "PNG")
            for ending, content in (("cls", b"%d" % (number % 3)), ("png", buffer.getvalue())):
                member = tarfile.TarInfo(f"{number:02}.{ending}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    source = open_source(f"{tmp_path}/a.tar")
    fitted = CentroidTokenizer.fit(source, 4, patch_size=8, image_size=16, iters=2, per_class=2)
    assert fitted.facts["images"] == 6
