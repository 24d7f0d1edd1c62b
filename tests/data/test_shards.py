"""Facts about shards: every image once, labels, order settled before reading, damage survived."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from patchloom.data import open_source
from patchloom.data.base import Sample, Unreadable
from patchloom.data.loader import make_loader
from patchloom.errors import UsageError

pytest.importorskip("webdataset")

from patchloom.data.shard_files import TRUNCATED
from patchloom.data.shards import ShardSource, expand_shards
from patchloom.data.stream_order import StreamOrder

PER_SHARD = 7


def picture(value: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (12, 10), (value, value, value)).save(file, "PNG")
    return file.getvalue()


def write_tar(path: Path, files: list[tuple[str, bytes]], mode: Any = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def write_shards(folder: Path, count: int = 4, per_shard: int = PER_SHARD) -> str:
    for shard in range(count):
        files = []
        for number in range(shard * per_shard, (shard + 1) * per_shard):
            files += [(f"{number:04}.cls", str(number).encode()), (f"{number:04}.png", picture(number))]
        write_tar(folder / f"train-{shard:03}.tar", files)
    return f"{folder}/train-{{000..{count - 1:03}}}.tar"


@pytest.fixture(scope="module")
def pattern(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_shards(tmp_path_factory.mktemp("shards"))


def labels(items: Any) -> list[int]:
    return [item.label for item in items if isinstance(item, Sample)]


def as_is(image: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    return {"image": image, "noise": torch.rand(2, generator=generator)}


def test_braces_wildcards_and_lists_name_the_same_shards(pattern: str) -> None:
    folder = Path(pattern).parent
    expected = [folder / f"train-{shard:03}.tar" for shard in range(4)]
    assert expand_shards([pattern]) == expected
    assert expand_shards([f"{folder}/*.tar"]) == expected
    assert expand_shards([f"{folder}/train-{{000..001}}.tar", *expected[2:]]) == expected
    assert expand_shards([str(expected[1])]) == expected[1:2]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("train-{000..009}.tar", r"shard '.*train-004.tar' does not exist \(10 are named by"),
        ("test-*.tar", "no shard matches '.*test-"),
        ("other.tar", "shard '.*other.tar' does not exist$"),
    ],
)
def test_missing_shards_are_named(pattern: str, name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ShardSource(str(Path(pattern).parent / name))


def test_urls_and_empty_lists_are_refused() -> None:
    with pytest.raises(UsageError, match=r"local or mounted folder, where .* not from 'https://"):
        ShardSource("https://host/train-000.tar")
    with pytest.raises(UsageError, match="list of shards is empty"):
        ShardSource([])


def test_shards_without_images_are_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("1.txt", b"x"), ("2.cls", b"3")])
    with pytest.raises(UsageError, match="no image in the 1 shards"):
        ShardSource(tmp_path / "a.tar")


def test_images_labels_and_keys_in_order(pattern: str) -> None:
    source = pickle.loads(pickle.dumps(ShardSource(pattern)))
    assert (source.num_samples, source.sizes) == (28, [7] * 4)
    items = list(source.samples(epoch=0, seed=0, shuffle=False))
    assert labels(items) == list(range(28))
    assert items[8].key == "train-001.tar/0008.png"
    assert items[8].image.shape == (3, 10, 12)
    assert items[8].image.dtype == torch.uint8
    assert (items[8].image == 8).all()


@given(
    world=st.integers(1, 5),
    workers=st.integers(1, 5),
    epoch=st.integers(0, 2),
    shuffle=st.booleans(),
    skip=st.integers(0, 12),
    buffer=st.sampled_from([1, 3, 1000]),
)
@settings(max_examples=25, deadline=None)
def test_every_image_falls_to_one_reader_and_skip_is_a_tail(
    pattern: str, world: int, workers: int, epoch: int, shuffle: bool, skip: int, buffer: int
) -> None:
    source = ShardSource(pattern, buffer_size=buffer)
    seen = []
    for rank in range(world):
        order = StreamOrder(
            source.sizes,
            3,
            seed=1,
            lanes=workers,
            buffer_size=buffer,
            shuffle=shuffle,
            rank=rank,
            world_size=world,
        )
        for worker in range(workers):
            mine, tail = (
                labels(source.decode(encoded) for _, encoded in source.read(order.reading(epoch, worker), passed))
                for passed in (0, skip)
            )
            assert tail == mine[skip:]
            seen += mine
    assert sorted(set(seen)) == list(range(28))
    assert len(seen) - 28 == (-28 % world if shuffle else 0)
    shares = [labels(source.samples(epoch=0, seed=1, rank=rank, world_size=world)) for rank in range(world)]
    assert sorted(label for share in shares for label in share) == list(range(28))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_sample_is_taken_from_all_over_the_shards(pattern: str, tmp_path: Path) -> None:
    source = ShardSource(pattern)
    for seed in range(5):
        taken = labels(source.samples(epoch=0, seed=seed, count=8))
        assert len(set(taken)) == 8
        assert {label // PER_SHARD for label in taken} == {0, 1, 2, 3}
        parts = [labels(source.samples(epoch=0, seed=seed, count=8, rank=rank, world_size=3)) for rank in range(3)]
        assert sorted(label for part in parts for label in part) == sorted(taken)
    assert sorted(labels(source.samples(epoch=0, seed=0, count=99))) == list(range(28))
    for shard in (0, 1):
        write_tar(tmp_path / f"{shard}.tar.gz", [(f"{n}.png", picture(n)) for n in range(4)], "w:gz")
    assert len(list(ShardSource(f"{tmp_path}/*.tar.gz").samples(epoch=0, seed=0, count=3))) == 3


def test_order_changes_with_epoch_and_seed(pattern: str) -> None:
    source = ShardSource(pattern)
    orders = [labels(source.samples(epoch=e, seed=s)) for e, s in ((0, 0), (0, 0), (1, 0), (0, 1))]
    assert orders[0] == orders[1]
    assert orders[0] != orders[2]
    assert orders[0] != orders[3]


def test_skipping_decodes_nothing_and_goes_straight_to_what_is_left(
    pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from patchloom.data import shards

    source = ShardSource(pattern)
    decoded, opened = [], []
    decode, read = shards.decode_image, shards.read_images
    monkeypatch.setattr(shards, "decode_image", lambda *args: (decoded.append(args[1]), decode(*args))[1])
    monkeypatch.setattr(
        shards,
        "read_images",
        lambda shard, start, *how: (opened.append((shard.name, start)), read(shard, start, *how))[1],
    )
    loader = make_loader(source, as_is, 1, shuffle=False, num_workers=0)
    loader.set_position(0, 23)
    assert [batch["label"].item() for batch in loader] == list(range(23, 28))
    assert len(decoded) == 5
    assert opened == [("train-003.tar", source._starts[3][2])]


def test_label_sources_and_which_file_is_the_image(tmp_path: Path) -> None:
    write_tar(
        tmp_path / "a.tar",
        [
            ("__meta__/info.json", b"{}"),
            ("x/1.depth.png", picture(1)),
            ("x/1.JPG", picture(2)),
            ("x/1.json", json.dumps({"label": 5}).encode()),
            ("x/1.txt", b"a caption"),
            ("x/2.png", picture(3)),
            ("x/3.png", picture(4)),
            ("x/3.cls", b"seven"),
            ("y/3.png", picture(5)),
            ("y/3.json", b"[1]"),
        ],
    )
    items = list(ShardSource(tmp_path / "a.tar").samples(epoch=0, seed=0, shuffle=False))
    assert [(item.key, item.label) for item in items if isinstance(item, Sample)] == [
        ("a.tar/x/1.JPG", 5),
        ("a.tar/x/2.png", -1),
        ("a.tar/y/3.png", -1),
    ]
    assert isinstance(items[2], Unreadable)
    assert items[2].key == "a.tar/x/3.png"
    assert "label is not a whole number" in items[2].reason


def test_shards_of_one_name_are_told_apart(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write_tar(tmp_path / folder / "0.tar", [("1.png", picture(1))])
    items = ShardSource(f"{tmp_path}/{{a,b}}/0.tar").samples(epoch=0, seed=0, shuffle=False)
    assert [item.key for item in items] == ["a/0.tar/1.png", "b/0.tar/1.png"]


@pytest.mark.parametrize("keep", [0, 100, 512, 700, 1536, 1600, 2060, 3000, 4100, 5200])
def test_a_shard_cut_short_costs_its_rest_and_says_so(tmp_path: Path, keep: int) -> None:
    pattern = write_shards(tmp_path, count=2)
    cut = tmp_path / "train-000.tar"
    cut.write_bytes(cut.read_bytes()[:keep])
    source = ShardSource(pattern)
    items = list(source.samples(epoch=0, seed=0, shuffle=False))
    assert len(items) == source.num_samples
    assert labels(items)[-PER_SHARD:] == list(range(PER_SHARD, 2 * PER_SHARD))
    broken = [item for item in items if isinstance(item, Unreadable)]
    assert all(item == Unreadable("train-000.tar", TRUNCATED) for item in broken)
    assert len(broken) == 1
    assert labels(items)[:-PER_SHARD] == list(range(len(items) - PER_SHARD - 1))


def test_compressed_shards_and_broken_images(tmp_path: Path) -> None:
    write_tar(
        tmp_path / "a.tar.gz", [("1.png", picture(1)), ("2.png", b"not a picture"), ("3.png", picture(3))], "w:gz"
    )
    items = list(ShardSource(tmp_path / "a.tar.gz").samples(epoch=0, seed=0, shuffle=False))
    assert [type(item) for item in items] == [Sample, Unreadable, Sample]
    assert items[1].key == "a.tar.gz/2.png"


def test_fingerprint_follows_the_files(tmp_path: Path) -> None:
    pattern = write_shards(tmp_path, count=2)
    before = ShardSource(pattern).fingerprint()
    assert before == ShardSource(pattern).fingerprint()
    write_tar(tmp_path / "train-001.tar", [("1.png", picture(1))])
    assert ShardSource(pattern).fingerprint() != before


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loader_resumes_shards_exactly(pattern: str, num_workers: int) -> None:
    loader = make_loader(ShardSource(pattern), as_is, 5, seed=3, shuffle=True, num_workers=num_workers)
    assert len(loader) == 6
    whole = list(loader)
    assert [len(batch["key"]) for batch in whole] == [5] * 5 + [3]
    for done in (1, 4, 5):
        loader.set_position(0, done)
        rest = list(loader)
        assert [batch["key"] for batch in rest] == [batch["key"] for batch in whole[done:]]
        assert all(torch.equal(a["noise"], b["noise"]) for a, b in zip(rest, whole[done:], strict=True))
    loader.set_position(1, 0)
    assert [batch["key"] for batch in loader] != [batch["key"] for batch in whole]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loader_evaluates_every_image_of_shards_once_and_in_order(pattern: str, num_workers: int) -> None:
    found = list(make_loader(ShardSource(pattern), as_is, 5, shuffle=False, num_workers=num_workers))
    assert [len(batch["key"]) for batch in found] == [5, 5, 5, 5, 5, 3]
    assert torch.cat([batch["label"] for batch in found]).tolist() == list(range(28))
    assert torch.cat([batch["index"] for batch in found]).tolist() == list(range(28))


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4")
def test_shards_of_unequal_sizes_are_seen_alike_with_more_workers_than_shards(tmp_path: Path) -> None:
    for shard, images in enumerate((range(11), range(11, 22), range(22, 24))):
        files = [
            (f"{n:02}.{kind}", picture(n) if kind == "png" else b"%d" % n) for n in images for kind in ("png", "cls")
        ]
        write_tar(tmp_path / f"{shard}.tar{'.gz' if shard == 1 else ''}", files, "w:gz" if shard == 1 else "w")
    loader = make_loader(ShardSource(f"{tmp_path}/*.tar*"), as_is, 5, shuffle=True, num_workers=4)
    for epoch in range(3):
        loader.set_position(epoch)
        assert sorted(torch.cat([batch["label"] for batch in loader]).tolist()) == list(range(24))


def test_members_whose_names_are_not_utf_8_are_told_as_text(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        for name in (b"g\xe9.png", b"br\xe9ken.png"):
            content = io.BytesIO()
            Image.new("RGB", (8, 8)).save(content, "PNG")
            data = content.getvalue() if name.startswith(b"g") else b"junk"
            info = tarfile.TarInfo(os.fsdecode(name))
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    samples = list(ShardSource(path).samples(epoch=0, seed=0, shuffle=False))
    assert [sample.key for sample in samples] == [r"a.tar/g\xe9.png", r"a.tar/br\xe9ken.png"]
    assert isinstance(samples[1], Unreadable)


def deep(value: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((4, 4), value, np.uint16)).save(file, "PNG")
    return file.getvalue()


def test_the_value_range_is_settled_on_images_from_all_over_the_shards(tmp_path: Path, capsys: Any) -> None:
    # The bright images stand at the ends of six shards.
    for shard in range(6):
        files = [(f"{n}.png", deep(60_000 if n == 39 else 900)) for n in range(40)]
        write_tar(tmp_path / f"{shard}.tar", files)
    source = open_source(f"{tmp_path}/*.tar")
    assert source.values.bounds_of("uint16") == (0, 65_535)
    assert "looked at" not in capsys.readouterr().err
    assert len({key.partition("/")[0] for key, _ in source.stored(40)}) == 6


def test_of_compressed_shards_it_is_said_what_was_looked_at(tmp_path: Path, capsys: Any) -> None:
    for shard in range(20):
        write_tar(tmp_path / f"{shard}.tar.gz", [("1.png", deep(900)), ("2.png", deep(1000))], "w:gz")
    open_source(f"{tmp_path}/{{0..19}}.tar.gz")
    assert (
        "(looked at: the first images of 16 of 20 shards, which are compressed; value_range=" in capsys.readouterr().err
    )
