"""Features of a source: in its order, from an encoder that is left as it was found."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from patchloom.data import MemorySource, Sample, SubsetSource, open_source
from patchloom.data.base import Source, StreamSource, Unreadable, UnreadableImageError
from patchloom.data.transforms import EvalTransform, WholeImageTransform
from patchloom.encoders import create_encoder, normalize, pooled
from patchloom.errors import UsageError
from patchloom.features.extract import extract


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return create_encoder("ccvit_tiny_patch4_32", image_size=16, embed_dim=48, depth=2, num_heads=3).eval()


def source_of(count: int = 11, side: int = 16) -> MemorySource:
    generator = torch.Generator().manual_seed(0)
    shape = (3, side, side)
    samples = [
        Sample(torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8), n % 3, f"{n:02d}.png")
        for n in range(count)
    ]
    return MemorySource("memory", samples, ["a", "b", "c"])


class Damaged(Source):
    """A source in which every third image is broken."""

    name, class_names, in_chans = "damaged", None, 3

    def __len__(self) -> int:
        return 9

    def read(self, index: int) -> Sample:
        if index % 3 == 0:
            raise UnreadableImageError(self.key(index), "truncated")
        return source_of().read(index)

    def key(self, index: int) -> str:
        return f"{index:02d}.png"

    def fingerprint(self) -> str:
        return "damaged"


class Stream(StreamSource):
    """The images of a source in a stream, one of them broken."""

    name, in_chans = "stream", 3

    sizes = (1, 11)

    def encoded(self, shard, numbers):
        return ((shard, number) for number in numbers.tolist())

    def decode(self, encoded):
        shard, number = encoded
        return source_of().read(number) if shard else Unreadable("bad.png", "truncated")

    def fingerprint(self) -> str:
        return "stream"


@pytest.mark.parametrize("num_workers", [0, 2])
def test_vectors_are_the_encoders_in_the_order_of_the_source(encoder, num_workers):
    source = source_of()
    features = extract(encoder, source, batch_size=4, num_workers=num_workers, device="cpu", progress=False)
    images = torch.stack([source.read(n).image for n in range(len(source))]).float() / 255
    with torch.no_grad():
        expected = pooled(encoder, normalize(images, encoder))
    torch.testing.assert_close(features.vectors, expected, rtol=1e-4, atol=1e-5)
    assert features.keys == [source.key(n) for n in range(11)]
    assert features.labels.tolist() == [n % 3 for n in range(11)]
    assert features.vectors.dtype == torch.float32
    assert not features.vectors.requires_grad
    assert features.skipped == []


def test_batch_size_does_not_change_a_feature(encoder):
    one, all_at_once = (
        extract(encoder, source_of(), batch_size=size, num_workers=0, progress=False).vectors for size in (1, 64)
    )
    torch.testing.assert_close(one, all_at_once, rtol=1e-4, atol=1e-5)


def test_broken_images_are_left_out_and_listed(encoder):
    features = extract(encoder, Damaged(), batch_size=3, num_workers=0, progress=False)
    assert features.keys == ["01.png", "02.png", "04.png", "05.png", "07.png", "08.png"]
    assert len(features.vectors) == len(features.labels) == 6
    assert sorted(key for key, _ in features.skipped) == ["00.png", "03.png", "06.png"]


def test_a_source_of_broken_images_only_is_refused(encoder):
    with pytest.raises(UsageError, match="readable"):
        extract(encoder, SubsetSource(Damaged(), np.array([0, 3])), num_workers=0, progress=False)


def test_the_encoder_is_left_as_it_was_found(encoder):
    encoder.train()
    encoder.blocks[0].eval()  # a frozen part
    before = {name: module.training for name, module in encoder.named_modules()}
    extract(encoder, source_of(3), num_workers=0, progress=False)
    assert {name: module.training for name, module in encoder.named_modules()} == before
    with pytest.raises(UsageError):
        extract(encoder, source_of(3), pool="cls+max", num_workers=0, progress=False)
    assert {name: module.training for name, module in encoder.named_modules()} == before
    encoder.eval()


def test_training_randomness_plays_no_part():
    torch.manual_seed(0)
    dropping = create_encoder("ccvit_tiny_patch4_32", image_size=16, drop_path=0.5, embed_dim=48, depth=2, num_heads=3)
    dropping.train()
    first, second = (extract(dropping, source_of(), num_workers=0, progress=False).vectors for _ in range(2))
    assert torch.equal(first, second)


def test_another_size_works_on_a_copy(encoder):
    features = extract(encoder, source_of(side=24), image_size=24, num_workers=0, progress=False)
    assert features.vectors.shape == (11, 48)
    assert encoder.patch_embed.img_size == (16, 16)
    with pytest.raises(UsageError, match="image size 18 is not divisible by patch size 4"):
        extract(encoder, source_of(), image_size=18, num_workers=0, progress=False)


def test_an_oblong_encoder_sees_oblong_images():
    oblong = create_encoder("ccvit_tiny_patch4_32", image_size=(16, 24), embed_dim=48, depth=1, num_heads=3).eval()
    source = source_of(2)
    shown = torch.stack([EvalTransform((16, 24))(source.read(number).image)["image"] for number in range(2)]) / 255
    with torch.no_grad():
        expected = pooled(oblong, normalize(shown, oblong))
    torch.testing.assert_close(extract(oblong, source, num_workers=0, progress=False).vectors, expected)
    pixels = extract(None, source, image_size=(16, 24), num_workers=0, progress=False)
    torch.testing.assert_close(pixels.vectors, shown.flatten(1))


@pytest.mark.parametrize(("pool", "width"), [("auto", 48), ("cls", 48), ("avg", 48), ("cls+avg", 96)])
def test_pooling_sets_the_width(encoder, pool, width):
    assert extract(encoder, source_of(3), pool=pool, num_workers=0, progress=False).vectors.shape == (3, width)


def test_half_precision_is_near_and_full_precision_ignores_the_callers(encoder):
    full = extract(encoder, source_of(), num_workers=0, progress=False).vectors
    half = extract(encoder, source_of(), precision="bf16", num_workers=0, progress=False).vectors
    assert half.dtype == torch.float32
    assert not torch.equal(half, full)
    assert torch.nn.functional.cosine_similarity(half, full).min() > 0.999
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(extract(encoder, source_of(), num_workers=0, progress=False).vectors, full)


def test_raw_pixels_are_the_image():
    source = source_of(side=16)
    features = extract(None, source, image_size=16, num_workers=0, progress=False)
    assert torch.equal(features.vectors[5], source.read(5).image.flatten() / 255)
    assert extract(None, source, num_workers=0, progress=False).vectors.shape == (11, 3 * 32 * 32)


@pytest.mark.parametrize("source", [source_of(), Stream()], ids=["map", "stream"])
def test_a_limit_takes_the_first(encoder, source):
    features = extract(encoder, source, batch_size=4, num_workers=0, limit=6, progress=False)
    assert features.keys == [f"{n:02d}.png" for n in range(6)]
    assert len(features.vectors) == len(features.labels) == 6
    with pytest.raises(UsageError, match="limit is 0"):
        extract(encoder, source, limit=0, num_workers=0, progress=False)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_stream_gives_every_image_once(encoder, num_workers):
    features = extract(encoder, Stream(), batch_size=4, num_workers=num_workers, progress=False)
    whole = extract(encoder, source_of(), num_workers=0, progress=False)
    assert sorted(features.keys) == whole.keys
    assert features.skipped == [("bad.png", "truncated")]
    order = torch.tensor([whole.keys.index(key) for key in features.keys])
    torch.testing.assert_close(features.vectors, whole.vectors[order], rtol=1e-4, atol=1e-5)


def test_a_folder_is_read_in_its_order(encoder, tmp_path):
    rng = np.random.default_rng(0)
    for name in ("b/1.png", "a/2.png", "a/1.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(tmp_path / name)
    features = extract(encoder, open_source(str(tmp_path)), num_workers=0, progress=False)
    assert features.keys == ["a/1.png", "a/2.png", "b/1.png"]
    assert features.labels.tolist() == [0, 0, 1]


@pytest.mark.parametrize("device", ["cud", "cuda:99"])
def test_a_device_that_is_not_here_is_refused(encoder, device):
    with pytest.raises(UsageError, match=f"there is no device '{device}'"):
        extract(encoder, source_of(), device=device, num_workers=0, progress=False)


def test_an_unknown_precision_is_refused(encoder):
    with pytest.raises(UsageError, match="unknown precision 'bf15'; did you mean bf16"):
        extract(encoder, source_of(), precision="bf15", num_workers=0, progress=False)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_same_features(encoder):
    here, there = (extract(encoder, source_of(), device=d, num_workers=0, progress=False) for d in ("cpu", "cuda"))
    torch.testing.assert_close(here.vectors, there.vectors, rtol=1e-3, atol=1e-3)
    assert next(encoder.parameters()).device.type == "cpu"


def test_the_view_is_what_the_encoder_sees(encoder):
    source = source_of(3, side=24)
    seen = extract(encoder, source, view="whole", num_workers=0, device="cpu")
    images = torch.stack([WholeImageTransform(16)(source.read(n).image)["image"] for n in range(3)])
    with torch.no_grad():
        torch.testing.assert_close(seen.vectors, pooled(encoder, normalize(images / 255, encoder)))
    assert not torch.allclose(seen.vectors, extract(encoder, source, num_workers=0, device="cpu").vectors)
    with pytest.raises(UsageError, match="unknown view"):
        extract(encoder, source, view="half", num_workers=0, device="cpu")
