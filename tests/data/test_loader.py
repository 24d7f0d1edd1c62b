"""Facts about batches: who gets what, when, again after a resume, and in spite of broken images."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import islice
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
from patchloom.data.stream_order import ShuffleBuffer, StreamOrder
from patchloom.data.workers import StreamBatches
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
    """Numbers in a stream of one shard, or of several; what is read of it is counted."""

    name = "stream"

    def __init__(self, *sizes: int, broken: frozenset[int] = frozenset(), buffer_size: int = 1000) -> None:
        self.sizes, self.broken, self.buffer_size = sizes, broken, buffer_size
        self.reads = 0

    def encoded(self, shard: int, numbers: np.ndarray) -> Iterator[int]:
        for number in numbers.tolist():
            self.reads += 1
            yield sum(self.sizes[:shard]) + number

    def decode(self, encoded: int) -> Sample | Unreadable:
        if encoded in self.broken:
            return Unreadable(str(encoded), "cut short")
        return Sample(torch.full((3, 4, 4), encoded % 256, dtype=torch.uint8), encoded, str(encoded))

    def fingerprint(self) -> str:
        return str(self.sizes)


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
@pytest.mark.parametrize("source", [Numbers(23, frozenset({3, 4, 11})), Stream(23, broken=frozenset({3, 4, 11}))])
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
    whole = batches(Stream(9, 4, broken=frozenset({5})), 3, **options)
    assert len(whole) == 14
    for done in (5, 10, 13):
        assert equal(batches(Stream(9, 4, broken=frozenset({5})), 3, (0, done), **options), whole[done:])


def test_resume_reads_nothing_twice() -> None:
    source = Numbers(100)
    batches(source, 10, (0, 8))
    assert source.reads == 20


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_evaluated_stream_resumes_where_it_stopped(num_workers: int) -> None:
    source = Stream(20, 3, broken=frozenset({3}))
    whole = batches(source, 4, seed=2, shuffle=False, num_workers=num_workers)
    assert sum(len(batch["key"]) for batch in whole) == 22
    assert equal(batches(source, 4, (0, 2), seed=2, shuffle=False, num_workers=num_workers), whole[2:])


@pytest.mark.parametrize("shuffle", [True, False])
def test_resume_of_a_stream_reads_nothing_twice(shuffle: bool) -> None:
    source = Stream(60, 40, buffer_size=10)
    batches(source, 10, (0, 8), shuffle=shuffle)
    assert source.reads == 20


@pytest.mark.parametrize("kind", [Numbers, Stream])
def test_training_replaces_broken_images(kind: type) -> None:
    source = kind(20, broken=frozenset({2, 3, 19}))
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
    found = batches(kind(20, broken=frozenset({0, 1, 2, 3, 9})), 4, shuffle=False)
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
        batches(kind(5, broken=frozenset(range(5))), 2, shuffle=shuffle, num_workers=num_workers)


def test_a_whole_batch_of_broken_images_in_a_stream_is_filled_from_elsewhere() -> None:
    order = torch.cat([batch["label"] for batch in batches(Stream(12), 4)]).tolist()
    source = Stream(12, broken=frozenset(order[4:8]))
    found = batches(source, 4)
    assert [len(batch["key"]) for batch in found] == [4, 4, 4]
    readable = [*range(order[7], 12), *range(order[7])]
    assert found[1]["label"].tolist() == [image for image in readable if image not in order[4:8]][:4]
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


def stream_epochs(sizes: tuple[int, ...], batch_size: int, epochs: int, **options: Any) -> list[list[list[list[int]]]]:
    """Return the images of every epoch, rank and batch, as the workers' parts are put together, without workers."""
    workers, world = options.pop("workers"), options.pop("world_size")
    options = {"seed": 1, "world_size": world, "lanes": workers, "buffer_size": 7} | options
    ranks = [
        StreamBatches(Stream(*sizes), as_is, StreamOrder(sizes, batch_size, rank=rank, **options))
        for rank in range(world)
    ]
    found = []
    for epoch in range(epochs):
        of_epoch = []
        for one in ranks:
            count = one.order.num_batches
            parts = [one.batches(epoch, range(worker, count, workers)) for worker in range(workers)]
            made = [next(parts[step % workers]) for step in range(count)]
            of_epoch.append([batch["index"].tolist() for batch in made])
        found.append(of_epoch)
    return found


def test_other_numbers_of_workers_make_the_same_batches_of_a_streams_lanes() -> None:
    options: dict[str, Any] = {"world_size": 2, "shuffle": True, "lanes": 4}
    expected = stream_epochs((40, 40, 8), 5, 2, workers=4, **options)
    for workers in (1, 2, 3, 5):
        assert stream_epochs((40, 40, 8), 5, 2, workers=workers, **options) == expected


SIZES = [(40, 40, 8), (88,), (1, 0, 200, 3), (5,) * 9, (2,)]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("workers", [1, 2, 3, 5])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_image_of_a_stream_comes_once_an_epoch(sizes: tuple[int, ...], workers: int, world_size: int) -> None:
    images = sum(sizes)
    for batch_size, shuffle in ((3, True), (7, True), (16, True), (7, False)):
        options: dict[str, Any] = {"workers": workers, "world_size": world_size, "shuffle": shuffle}
        for epoch in stream_epochs(sizes, batch_size, 3, **options):
            seen = np.bincount([image for rank in epoch for batch in rank for image in batch], minlength=images)
            assert seen.min() == 1
            # Training lets all ranks take equally large steps: one image more on some of them, at the most.
            assert seen.sum() - images == (-images % world_size if shuffle else 0)
            assert seen.max() <= (2 if images >= world_size else world_size)
            if shuffle:
                assert len({tuple(map(len, rank)) for rank in epoch}) == 1


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ((40, 40, 8), {"drop_last": True}),
        ((40, 40, 8), {"drop_last": True, "epoch_length": 230}),
        ((7, 1, 90), {"epoch_length": 30}),
        ((70, 10, 70), {"drop_last": True, "accumulate": 3}),
        ((3, 1), {}),
    ],
)
def test_what_an_epoch_leaves_out_or_repeats_falls_on_all_alike(
    sizes: tuple[int, ...], options: dict[str, Any]
) -> None:
    seen = np.zeros(sum(sizes), dtype=int)
    for epoch in stream_epochs(sizes, 5, 30, workers=2, world_size=3, shuffle=True, **options):
        seen += np.bincount([image for rank in epoch for batch in rank for image in batch], minlength=sum(sizes))
        assert seen.max() - seen.min() <= 1


def test_what_an_epoch_leaves_out_and_repeats_is_counted() -> None:
    for source in (Numbers(88), Stream(40, 40, 8)):
        dropping = make_loader(source, as_is, 16, shuffle=True, drop_last=True, world_size=2)
        assert (len(dropping), dropping.left_out, dropping.repeated) == (2, 24, 0)
        steps = make_loader(source, as_is, 8, shuffle=True, drop_last=True, accumulate=4)
        assert (len(steps), steps.left_out) == (8, 24)
        repeating = make_loader(source, as_is, 16, shuffle=True, world_size=3)
        assert (len(repeating), repeating.left_out, repeating.repeated) == (2, 0, 2)
        whole = make_loader(source, as_is, 16, shuffle=False, world_size=3)
        assert (whole.left_out, whole.repeated) == (0, 0)


@given(
    sizes=st.lists(st.integers(0, 30), min_size=1, max_size=5).filter(any),
    b=st.integers(1, 9),
    world=st.integers(1, 4),
    workers=st.integers(1, 4),
    drop_last=st.booleans(),
    length=st.one_of(st.none(), st.integers(1, 70)),
)
@settings(max_examples=60, deadline=None)
def test_an_evaluated_stream_comes_in_the_batches_of_a_folder(
    sizes: list[int], b: int, world: int, workers: int, drop_last: bool, length: int | None
) -> None:
    options: dict[str, Any] = {"shuffle": False, "drop_last": drop_last, "epoch_length": length}
    [found] = stream_epochs(tuple(sizes), b, 1, workers=workers, world_size=world, **options)
    for rank, of_rank in enumerate(found):
        order = EpochOrder(sum(sizes), b, seed=0, rank=rank, world_size=world, **options)
        assert of_rank == [[slot.image for slot in batch] for batch in order.batches(0)]


@given(count=st.integers(0, 300), size=st.integers(1, 40), seed=st.integers(0, 100))
@settings(max_examples=60, deadline=None)
def test_buffer_lets_every_place_out_once_and_none_too_early(count: int, size: int, seed: int) -> None:
    order = list(ShuffleBuffer(count, size, np.random.default_rng(seed)))
    assert sorted(order) == list(range(count))
    assert all(place <= number + size - 1 for number, place in enumerate(order))


def test_a_single_shard_is_divided_elsewhere_each_epoch() -> None:
    epochs = stream_epochs((60,), 5, 6, workers=2, world_size=2, shuffle=True)
    halves = {tuple(sorted(image for batch in epoch[0] for image in batch)) for epoch in epochs}
    assert len(halves) > 4


def test_a_stream_of_ten_million_images_starts_in_seconds_and_little_memory() -> None:
    order = StreamOrder(
        [10_000] * 1000,
        256,
        seed=0,
        lanes=4,
        buffer_size=1000,
        shuffle=True,
        rank=7,
        world_size=8,
        drop_last=True,
    )
    start = time.perf_counter()
    reading = order.reading(3, 3)
    assert len(next(reading.visits).numbers) <= 10_000
    assert len(list(islice(reading.order, 5000))) == 5000
    assert len(reading.order.held) == 1000
    assert time.perf_counter() - start < 10


@pytest.mark.filterwarnings("ignore:This DataLoader will create 5")
@pytest.mark.parametrize("num_workers", [0, 2, 5])
def test_workers_read_a_stream_as_dealt(num_workers: int) -> None:
    loader = make_loader(Stream(40, 40, 8, buffer_size=7), as_is, 7, seed=1, shuffle=True, num_workers=num_workers)
    [[expected]] = stream_epochs((40, 40, 8), 7, 1, workers=max(1, num_workers), world_size=1, shuffle=True)
    assert [batch["index"].tolist() for batch in loader] == expected


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
        ({"source": Stream(0, 0)}, "'stream' holds no image"),
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
