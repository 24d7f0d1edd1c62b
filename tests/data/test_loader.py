"""Facts about batches: who gets what, when, again after a resume, and in spite of broken images."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from patchloom.data.base import Sample, Source, StreamSource, Unreadable, UnreadableImageError
from patchloom.data.loader import Loader, make_loader
from patchloom.data.order import EpochOrder
from patchloom.errors import UsageError


class Numbers(Source):
    """Images of one grey value; reading is counted, chosen ones are broken."""

    name = "numbers"

    def __init__(self, count: int, broken: frozenset[int] = frozenset()) -> None:
        self.count, self.broken = count, broken
        self.reads = 0

    def __len__(self) -> int:
        return self.count

    def read(self, index: int) -> Sample:
        if index in self.broken:
            raise UnreadableImageError(self.key(index), "cut short")
        self.reads += 1
        return Sample(torch.full((3, 4, 4), index % 256, dtype=torch.uint8), index % 10, self.key(index))

    def key(self, index: int) -> str:
        return f"{index}.png"

    def fingerprint(self) -> str:
        return str(self.count)


class Stream(StreamSource):
    """Numbers in a stream: worker w of W takes every W-th; lengths differ by worker."""

    name = "stream"

    def __init__(self, count: int, broken: frozenset[int] = frozenset(), known: bool = True) -> None:
        self.total, self.broken = count, broken
        self.num_samples = count if known else None

    def samples(
        self, *, epoch, seed, rank=0, world_size=1, worker=0, num_workers=1, shuffle=True, skip=0
    ) -> Iterator[Sample | Unreadable]:
        order = np.random.default_rng([seed, epoch]).permutation(self.total) if shuffle else np.arange(self.total)
        for index in order[rank * num_workers + worker :: world_size * num_workers][skip:].tolist():
            if index in self.broken:
                yield Unreadable(str(index), "cut short")
            else:
                yield Sample(torch.full((3, 4, 4), index, dtype=torch.uint8), index, str(index))

    def fingerprint(self) -> str:
        return str(self.total)


class Noisy:
    """A transform that draws, so that differing generators show."""

    def __call__(self, image: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        return {"image": image, "noise": torch.rand(2, generator=generator)}


def threads(image: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    return {"threads": torch.tensor(torch.get_num_threads())}


def as_is(image: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    return {"image": image}


def grown(image: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    return {"image": image[:, : 1 + int(image[0, 0, 0])]}


def batches(source: Any, batch_size: int, position: tuple[int, int] = (0, 0), **options: Any) -> list[dict]:
    options = {"num_workers": 0, "shuffle": True} | options
    loader = make_loader(source, options.pop("transform", Noisy()), batch_size, **options)
    loader.set_position(*position)
    return list(loader)


def equal(first: list[dict], second: list[dict]) -> bool:
    return len(first) == len(second) and all(
        a.keys() == b.keys() and all(torch.equal(a[n], b[n]) if isinstance(a[n], Tensor) else a[n] == b[n] for n in a)
        for a, b in zip(first, second, strict=True)
    )


def test_batch_contents() -> None:
    found = batches(Numbers(10), 4)
    assert [len(batch["key"]) for batch in found] == [4, 4, 2]
    for batch in found:
        assert batch["image"].dtype == torch.uint8
        assert batch["image"].shape[1:] == (3, 4, 4)
        assert torch.equal(batch["image"][:, 0, 0, 0].long(), batch["index"])
        assert torch.equal(batch["label"], batch["index"] % 10)
        assert batch["key"] == [f"{index}.png" for index in batch["index"].tolist()]
        assert batch["skipped"] == []
    assert sorted(torch.cat([batch["index"] for batch in found]).tolist()) == list(range(10))


@given(
    n=st.integers(1, 60),
    b=st.integers(1, 9),
    world=st.integers(1, 5),
    epoch=st.integers(0, 3),
    shuffle=st.booleans(),
    drop_last=st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_ranks_share_an_epoch(n: int, b: int, world: int, epoch: int, shuffle: bool, drop_last: bool) -> None:
    ranks = [
        EpochOrder(n, b, seed=1, shuffle=shuffle, rank=rank, world_size=world, drop_last=drop_last)
        for rank in range(world)
    ]
    found = [list(order.batches(epoch)) for order in ranks]
    assert [len(one) for one in found] == [order.num_batches for order in ranks]
    seen = [slot.image for one in found for batch in one for slot in batch]
    dropped = drop_last and n >= world * b
    if shuffle:
        assert len({len(one) for one in found}) == 1
        for step in zip(*found, strict=True):
            assert len({len(batch) for batch in step}) == 1
        assert len(seen) - len(set(seen)) < world  # repeats only to make the last step even
    else:
        assert len(seen) == len(set(seen))
    assert len(set(seen)) == (n - n % (world * b) if dropped else n)
    assert all(0 < len(batch) <= b for one in found for batch in one)


@given(n=st.integers(8, 80), b=st.integers(1, 4), start=st.integers(0, 5))
@settings(max_examples=80, deadline=None)
def test_one_process_with_twice_the_batch_sees_the_same_steps(n: int, b: int, start: int) -> None:
    n -= n % 2
    single = list(EpochOrder(n, 2 * b, seed=3, shuffle=True).batches(2, start))
    pair = [list(EpochOrder(n, b, seed=3, shuffle=True, rank=r, world_size=2).batches(2, start)) for r in (0, 1)]
    assert single == [first + second for first, second in zip(*pair, strict=True)]


def test_order_changes_with_epoch_and_seed_only() -> None:
    def order(**changed: int) -> list:
        options = {"seed": 0} | changed
        epoch = options.pop("epoch", 0)
        return [batch["key"] for batch in batches(Numbers(50), 10, (epoch, 0), **options)]

    assert order() == order() == order(num_workers=1)
    assert order() != order(epoch=1)
    assert order() != order(seed=1)


def test_repeated_images_come_in_a_row_and_are_drawn_for_anew() -> None:
    order = EpochOrder(10, 4, seed=0, shuffle=True, repeats=3)
    slots = [slot for batch in order.batches(0) for slot in batch]
    assert len(slots) == 10  # the epoch is as long, and shows a third of the images
    images = [slot.image for slot in slots]
    assert images[:9:3] == images[1:9:3] == images[2:9:3]
    assert len(set(images)) == 4
    assert len(set(slots)) == 10
    assert list(order.batches(0, 1)) == list(order.batches(0))[1:]
    long = EpochOrder(4, 4, seed=0, shuffle=True, repeats=2, epoch_length=16)
    slots = [slot for batch in long.batches(1) for slot in batch]
    assert sorted(slot.image for slot in slots) == sorted([0, 1, 2, 3] * 4)
    assert len(set(slots)) == 16


def test_draws_differ_by_image_epoch_and_turn() -> None:
    found = [
        tuple(row)
        for epoch in (0, 1)
        for batch in batches(Numbers(6), 6, (epoch, 0), epoch_length=18)
        for row in batch["noise"].tolist()
    ]
    assert len(set(found)) == len(found) == 36


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("source", [Numbers(23, frozenset({3, 4, 11})), Stream(23, frozenset({3, 4, 11}))])
def test_resume_in_mid_epoch_equals_no_interruption(source: Any, num_workers: int) -> None:
    loader = make_loader(source, Noisy(), 4, seed=5, shuffle=True, num_workers=num_workers)
    whole = []
    for epoch in range(2):
        loader.set_position(epoch, 0)
        whole.append(list(loader))
    assert [len(one) for one in whole] == [len(loader)] * 2 == [6, 6]
    for done in (1, 4, 6):
        loader.set_position(1, done)
        assert equal(list(loader), whole[1][done:])
    loader.set_position(0, 0)
    next(iter(loader))  # an epoch given up half-way leaves nothing behind
    loader.set_position(1, 3)
    assert equal(list(loader), whole[1][3:])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resume_of_a_stream_that_started_over(num_workers: int) -> None:
    options: dict[str, Any] = {"epoch_length": 40, "num_workers": num_workers, "seed": 4}
    whole = batches(Stream(13, frozenset({5})), 3, **options)
    assert len(whole) == 14
    for done in (5, 10, 13):
        assert equal(batches(Stream(13, frozenset({5})), 3, (0, done), **options), whole[done:])


def test_resume_reads_nothing_twice() -> None:
    source = Numbers(100)
    batches(source, 10, (0, 8))
    assert source.reads == 20


def test_resumed_stream_matches_for_unknown_length_and_evaluation() -> None:
    for options in ({"shuffle": True}, {"shuffle": False}):
        source = Stream(23, frozenset({3}), known=False)
        whole = batches(source, 4, seed=2, **options)
        assert sum(len(batch["key"]) for batch in whole) == (23 if options["shuffle"] else 22)
        assert equal(batches(source, 4, (0, 2), seed=2, **options), whole[2:])
        with pytest.raises(TypeError, match="number of images in 'stream' is unknown"):
            len(make_loader(source, as_is, 4, num_workers=0, **options))


@pytest.mark.parametrize("kind", [Numbers, Stream])
def test_training_replaces_broken_images(kind: type) -> None:
    source = kind(20, frozenset({2, 3, 19}))
    found = batches(source, 5, seed=1)
    assert [len(batch["key"]) for batch in found] == [5, 5, 5, 5]
    assert {key.removesuffix(".png") for batch in found for key, _ in batch["skipped"]} == {"2", "3", "19"}
    assert not {2, 3, 19} & {int(key.removesuffix(".png")) for batch in found for key in batch["key"]}
    assert equal(found, batches(source, 5, seed=1))
    drawn = torch.cat([batch["noise"] for batch in found])
    assert len(drawn.unique(dim=0)) == 20  # a stand-in is not the same view again


def test_next_readable_image_stands_in() -> None:
    found = batches(Numbers(20, frozenset({2, 3, 19})), 20)[0]
    counts = np.bincount(found["index"].numpy(), minlength=20)
    assert counts[4] == 3
    assert counts[0] == 2
    assert ("19.png", "cut short") in found["skipped"]


@pytest.mark.parametrize("kind", [Numbers, Stream])
def test_evaluation_leaves_broken_images_out(kind: type) -> None:
    found = batches(kind(20, frozenset({0, 1, 2, 3, 9})), 4, shuffle=False)
    assert all(batch["key"] for batch in found)
    keys = [int(key.removesuffix(".png")) for batch in found for key in batch["key"]]
    assert keys == [4, 5, 6, 7, 8, *range(10, 20)]
    assert [key.removesuffix(".png") for batch in found for key, _ in batch["skipped"]] == ["0", "1", "2", "3", "9"]


def test_a_broken_last_batch_is_still_reported() -> None:
    found = batches(Numbers(6, frozenset({4, 5})), 4, shuffle=False)
    assert len(found) == 1
    assert found[0]["skipped"] == [("4.png", "cut short"), ("5.png", "cut short")]


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("kind", [Numbers, Stream])
def test_a_source_with_nothing_readable_says_so(kind: type, shuffle: bool, num_workers: int) -> None:
    with pytest.raises(UsageError, match=r"^no image of '\w+' is readable"):
        batches(kind(5, frozenset(range(5))), 2, shuffle=shuffle, num_workers=num_workers)


def test_a_whole_batch_of_broken_images_in_a_stream_is_filled_from_elsewhere() -> None:
    order = np.random.default_rng([0, 0]).permutation(12)
    source = Stream(12, frozenset(order[4:8].tolist()))
    found = batches(source, 4)
    assert [len(batch["key"]) for batch in found] == [4, 4, 4]
    assert found[1]["label"].tolist() == order[8:].tolist()
    assert equal(batches(source, 4, (0, 1)), found[1:])


def test_small_sets_and_drop_last() -> None:
    assert [len(batch["key"]) for batch in batches(Numbers(3), 8)] == [3]
    assert [len(batch["key"]) for batch in batches(Numbers(3), 8, drop_last=True)] == [3]
    assert [len(batch["key"]) for batch in batches(Numbers(11), 4, drop_last=True)] == [4, 4]
    for rank in (0, 1):
        assert [len(b["key"]) for b in batches(Numbers(3), 8, drop_last=True, rank=rank, world_size=2)] == [2]


@pytest.mark.parametrize(
    ("shuffle", "length", "sizes"), [(True, 25, [8, 8, 8, 1]), (False, 25, [8, 2]), (True, 4, [4])]
)
def test_epoch_length(shuffle: bool, length: int, sizes: list[int]) -> None:
    found = batches(Numbers(10), 8, shuffle=shuffle, epoch_length=length)
    assert [len(batch["key"]) for batch in found] == sizes
    if shuffle and length > 20:
        counts = np.bincount(torch.cat([batch["index"] for batch in found]).numpy())
        assert set(counts) <= {2, 3}


def test_streams_of_several_ranks_have_equally_many_full_batches() -> None:
    found = [batches(Stream(21), 4, rank=rank, world_size=2) for rank in (0, 1)]
    assert [[len(batch["key"]) for batch in one] for one in found] == [[4, 4, 4]] * 2
    labels = [set(torch.cat([batch["label"] for batch in one]).tolist()) for one in found]
    assert not labels[0] & labels[1]
    assert len(labels[0] | labels[1]) == 21
    assert len(batches(Stream(3), 8, drop_last=True)) == 1
    assert len(batches(Stream(21), 4, epoch_length=40)) == 10


@pytest.mark.parametrize("num_workers", [1, 2])
def test_an_evaluated_stream_comes_whole_from_any_number_of_workers(num_workers: int) -> None:
    found = batches(Stream(23), 4, shuffle=False, num_workers=num_workers)
    assert sorted(torch.cat([batch["label"] for batch in found]).tolist()) == list(range(23))


def test_workers_stay_alive_and_use_one_thread() -> None:
    loader = make_loader(Numbers(8), threads, 4, shuffle=True, num_workers=2)
    assert all((batch["threads"] == 1).all() for batch in loader)
    workers = [worker.pid for worker in loader._batches.loader._iterator._workers]
    loader.set_position(1, 1)
    assert len(list(loader)) == 1
    assert [worker.pid for worker in loader._batches.loader._iterator._workers] == workers


def test_iterating_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    batches(Numbers(8), 4, num_workers=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_ten_million_images_are_shuffled_in_seconds() -> None:
    order = EpochOrder(10_000_000, 256, seed=0, shuffle=True)
    start = time.perf_counter()
    first = next(order.batches(0))
    last = list(order.batches(0, order.num_batches - 1))
    assert time.perf_counter() - start < 10
    assert (len(first), len(last)) == (256, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"num_workers": -1}, "num_workers is -1"),
        ({"epoch_length": 0}, "epoch_length is 0"),
        ({"rank": 2, "world_size": 2}, "rank is 2; with world_size 2 it must be from 0 to 1"),
        ({"source": Numbers(0)}, "'numbers' holds no image"),
        ({"repeats": 0}, "repeats is 0"),
        ({"source": Stream(8), "repeats": 2}, "come once each, not 2 times"),
    ],
)
def test_impossible_requests_are_refused(options: dict[str, Any], message: str) -> None:
    asked = {"source": Numbers(4), "batch_size": 2, "shuffle": True} | options
    source, batch_size = asked.pop("source"), asked.pop("batch_size")
    with pytest.raises(UsageError, match=message):
        make_loader(source, as_is, batch_size, **asked)


def test_positions_beyond_the_epoch_are_refused() -> None:
    loader: Loader = make_loader(Numbers(4), as_is, 2, shuffle=True, num_workers=0)
    loader.set_position(0, 2)
    assert list(loader) == []
    with pytest.raises(UsageError, match=r"3 batches done \(an epoch has 2 batches\)"):
        loader.set_position(0, 3)


def test_images_of_different_sizes_in_a_batch_are_named() -> None:
    with pytest.raises(UsageError, match=r"^'0.png' and '1.png' differ in shape"):
        batches(Numbers(4), 4, shuffle=False, transform=grown, num_workers=1)


def test_reports_stay_tuples_after_pinning(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils.data._utils.pin_memory import pin_memory

    loader = make_loader(Numbers(4, frozenset({1})), as_is, 4, shuffle=True, num_workers=0)
    unpinned = loader._batches.start(0, 0)
    report = [pin_memory(batch["skipped"]) for batch in unpinned]  # what happens to it without a GPU, too
    monkeypatch.setattr(loader._batches, "start", lambda *_: iter([{"skipped": report[0], "key": ["a"]}]))
    assert next(iter(loader))["skipped"] == [("1.png", "cut short")]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_pinned_batches_are_the_same_batches() -> None:
    pinned = batches(Numbers(10, frozenset({3})), 4, num_workers=2, pin_memory=True)
    assert all(batch["image"].is_pinned() for batch in pinned)
    assert equal(pinned, batches(Numbers(10, frozenset({3})), 4))
