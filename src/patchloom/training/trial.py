"""`--batch_size auto` and `--num_workers auto`: settled once, by a few steps before the run.

The batch is doubled for as long as it fits into memory and time is left. Of those that fit, the largest is taken that
is as fast per image as the fastest, to 5 %: beyond it a step takes longer and learns no more images. Workers are as
many as keep up with the steps. Both are said, and written down like settings that were given.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import io
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from patchloom.data import make_loader
from patchloom.data.survey import notice
from patchloom.errors import UsageError
from patchloom.training.config import Auto, Config, TrainConfig

if TYPE_CHECKING:
    from patchloom.data.base import Source, StreamSource
    from patchloom.training.attachment import Attachment
    from patchloom.training.method import Method

SECONDS = 30.0
"""Longest trial."""
ROOM = 0.8
"""Share of the memory there is that training may take: the probe, the report and other programs need some, too."""
AS_FAST = 0.95
READ = 16
"""Images read for the trial; larger batches repeat them."""
SPARE = 1.2
"""How much faster than the steps workers are to read."""


@dataclasses.dataclass(frozen=True)
class Tried:
    """One batch size in the trial."""

    batch_size: int
    seconds: float
    """Of a step."""
    memory: int
    """Bytes a step took at its peak, beyond what the model itself takes."""

    @property
    def images_per_second(self) -> float:
        return self.batch_size / self.seconds


def settle(
    config: Config,
    method_class: type[Method],
    source: Source | StreamSource,
    precision: str,
    attach: Sequence[Attachment] = (),
) -> Config:
    """Return the settings with a batch size and a number of workers in place of `auto`.

    Args:
        config: The settings.
        method_class: Takes the steps.
        source: The images.
        precision: Arithmetic of the run, as Lightning names it.
        attach: What rides on the steps.

    Raises:
        UsageError: Not one image fits, processes start together, or the method cannot be tried.
    """
    undecided = [name for name in ("batch_size", "num_workers") if isinstance(getattr(config, name), Auto)]
    if not undecided:
        return config
    if config.nodes > 1 or "TORCHELASTIC_RUN_ID" in os.environ or int(os.environ.get("SLURM_NTASKS", "1")) > 1:
        raise UsageError(
            f"{undecided[0]}=auto is settled by one process, and several start together here; give a number"
        )
    start, settled = time.monotonic(), dict[str, Any]()
    with contextlib.redirect_stderr(io.StringIO()):  # what the run says, it says by itself
        method = method_class(config, source)
        method.enter_trial()
        for part in attach:
            part.attach(method)
    if method.phases():
        raise UsageError(f"{undecided[0]}=auto tries steps of one loss, and this method has several; give a number")
    sample, reading = _sample(method)
    most = _most(config, method_class.images_to_learn_from(config, source)) if "batch_size" in undecided else None
    with _as_it_was():
        tried = trial(method, sample, precision, most=most, fixed=None if most else config.batch_size, start=start)
    if "batch_size" in undecided:
        best = choose(tried)
        settled["batch_size"] = best.batch_size
        rate = "" if config.lr_base_batch is None else ", the learning rate scaled to it"
        notice(
            f"batch_size=auto: {best.batch_size}, of {', '.join(str(one.batch_size) for one in tried)} tried "
            f"({best.images_per_second:.3g} images/s, {best.memory / 2**20:,.0f} MiB a step{rate})"
        )
    else:
        best = tried[-1]
    if "num_workers" in undecided:
        settled["num_workers"] = workers(reading, best.seconds / best.batch_size, _cores() // max(1, config.devices))
        notice(
            f"num_workers=auto: {settled['num_workers']} (reading an image takes {1000 * reading:.3g} ms, training on "
            f"it {1000 * best.seconds / best.batch_size:.3g} ms)"
        )
    return dataclasses.replace(config, **settled)


def choose(tried: list[Tried]) -> Tried:
    """Return the largest batch that is as fast per image as the fastest, to 5 %."""
    fastest = max(one.images_per_second for one in tried)
    return max((one for one in tried if one.images_per_second >= AS_FAST * fastest), key=lambda one: one.batch_size)


def workers(reading: float, training: float, cores: int) -> int:
    """Return how many workers keep up with training, and leave it a core.

    Args:
        reading: Seconds to read and augment an image.
        training: Seconds to train on one.
        cores: Cores for a device and its workers.
    """
    return max(1, min(math.ceil(SPARE * reading / training), cores - 1))


def trial(
    method: Method,
    sample: dict[str, Any],
    precision: str,
    *,
    most: int | None = None,
    fixed: int | None = None,
    start: float | None = None,
    seconds: float = SECONDS,
) -> list[Tried]:
    """Take steps with growing batches, and return those that fit.

    Args:
        method: Its weights are changed.
        sample: A few images as the loader gives them.
        precision: Arithmetic, as Lightning names it.
        most: Largest batch worth trying.
        fixed: Try this one alone.
        start: When the trial began, by the monotonic clock.
        seconds: When no further batch is begun.

    Raises:
        UsageError: The first batch does not fit.
    """
    device = _device(method.config.accelerator)
    start = time.monotonic() if start is None else start
    room = ROOM * free_memory(device)
    method.to(device).train()
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=0.0)
    tried: list[Tried] = []
    size = fixed or min(2, most or 2)
    while most is None or size <= most:
        try:
            tried.append(_step(method, optimizer, sample, size, precision, device))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if not tried:
                raise UsageError(f"a batch of {size} does not fit into memory; {REMEDIES}") from error
            break
        finally:
            optimizer.zero_grad(set_to_none=True)
            _let_go(device)
        last = tried[-1]
        late = time.monotonic() - start + 4 * last.seconds > seconds  # two steps of a batch twice as large
        if fixed or late or 2 * last.memory > room:
            break
        size *= 2
    return tried


REMEDIES = "take a smaller encoder or image_size, or set grad_checkpointing=true"


def _step(
    method: Method, optimizer: Any, sample: dict[str, Any], size: int, precision: str, device: torch.device
) -> Tried:
    """Take two steps, the first to warm up."""
    batch = repeated(sample, size, device)
    kind = torch.float16 if precision == "16-mixed" else torch.bfloat16
    took, peak, kept = 0.0, 0, dict[int, int]()

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    for number in range(2):
        before = _reset_peak(device)
        begun = time.monotonic()
        # What is kept for the gradients is counted as well: memory that was free already does not show as growth.
        counting = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with (
            torch.autocast(device.type, dtype=kind, enabled="mixed" in precision),
            counting if number == 0 else contextlib.nullcontext(),
        ):
            loss = method.training_loss(batch)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        took, peak = time.monotonic() - begun, max(peak, _peak(device) - before)
    return Tried(size, took, max(peak, sum(kept.values())))


def repeated(sample: dict[str, Any], size: int, device: torch.device) -> dict[str, Any]:
    """Return a batch of `size` out of that of a few images, as often as it takes."""
    count = len(sample["key"])
    rows = torch.arange(size) % count
    return {
        name: value[rows].to(device)
        if isinstance(value, Tensor)
        else [value[row] for row in rows.tolist()]
        if name == "key"
        else value
        for name, value in sample.items()
    }


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that there was not enough memory, on a GPU, in torch or in Python."""
    text = str(error)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)
    )


@contextlib.contextmanager
def memory_advice(config: TrainConfig) -> Iterator[None]:
    """Say what to change where memory runs out.

    Raises:
        UsageError: It did.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        size, times = config.batch_size, config.accumulate
        smaller = f"--batch_size {size // 2} --accumulate {2 * times} makes the same steps, " if size > 1 else ""
        raise UsageError(
            f"memory ran out with batch_size={size}: {smaller}--batch_size auto finds what fits; or {REMEDIES} "
            f"({' '.join(str(error).split())[:120]})"
        ) from error


def _sample(method: Method) -> tuple[dict[str, Any], float]:
    """Return a batch of a few images, and the seconds to read one."""
    config = method.config
    loader = make_loader(
        method.training_source(),
        method.transform(),
        READ,
        seed=config.seed,
        shuffle=True,
        num_workers=0,
        drop_last=False,
    )
    begun = time.monotonic()
    batch = next(iter(loader))
    return batch, (time.monotonic() - begun) / max(1, len(batch["key"]))


def _most(config: Any, images: int | None) -> int | None:
    """Return the largest power of two that leaves an epoch enough steps; None where nobody knows."""
    from patchloom.training.size import largest_batch

    return None if images is None else largest_batch(images, config)


@contextlib.contextmanager
def _as_it_was() -> Iterator[None]:
    """Let the run draw what it would have drawn without a trial."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        yield


def _device(accelerator: str) -> torch.device:
    if accelerator in ("auto", "gpu") and torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    if accelerator in ("auto", "mps") and torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def free_memory(device: torch.device) -> float:
    """Return the bytes that are free."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    meminfo, limit = Path("/proc/meminfo"), math.inf
    for name, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        group = Path("/sys/fs/cgroup")
        with contextlib.suppress(OSError, ValueError):  # no limit is set, or by other means
            limit = min(limit, int((group / name).read_text()) - int((group / used).read_text()))
    if meminfo.exists():
        line = next(line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable"))
        return min(limit, int(line.split()[1]) * 1024)
    return min(limit, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2)


def _reset_peak(device: torch.device) -> int:
    """Forget the peak of the memory taken so far, where that can be, and return what is taken now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS") or _peak(device)


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if peak := _status("VmHWM"):
        return peak
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _status(name: str) -> int:
    """Return a figure of this process on Linux in bytes; 0 elsewhere."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(name):
                return int(line.split()[1]) * 1024
    return 0


def _let_go(device: torch.device) -> None:
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
