"""Frames in time order as a data source: stacks of consecutive frames, and triplets of stacks in time.

`frames:PATH` names recordings (`patchloom data atari` makes them), `.npy` arrays of frames, the files of the DQN Replay
data set, or folders of images whose names are in time order. Which frames an index means depends on nothing but the
index.

>>> import numpy as np
>>> frames = np.arange(20, dtype=np.uint8).reshape(20, 1, 1)
>>> triplets = FrameStackDataset(frames)
>>> [stack.flatten().tolist() for stack in triplets[5]]
[[5, 6, 7], [2, 3, 4], [8, 9, 10]]
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from patchloom.base.source_options import choose
from patchloom.data.base import Sample, Source, UnreadableImageError, spread
from patchloom.data.decode import IMAGE_SUFFIXES, decode_frames
from patchloom.data.pixels import levels
from patchloom.data.survey import HEADERS, Survey, notice
from patchloom.data.value_range import ValueRange
from patchloom.errors import UsageError
from patchloom.io import existing, printable

FRAMES, ABOUT = "frames.npy", "recording.json"
PARTS = ("actions", "rewards", "episode_starts", "ram")
REPLAY_LIMIT = 100_000
BLANK_SHARE = 0.99


@dataclass
class Recording:
    """Frames of one game, robot or screen in time order, and what was noted beside them."""

    name: str
    """What is seen, such as the game's name; recordings of one name are of one class."""
    frames: np.ndarray
    """(n, H, W) uint8."""
    parts: dict[str, np.ndarray] = field(default_factory=dict)
    """One entry per frame: `actions` taken at it, `rewards` for them, `episode_starts`, the console's `ram`."""
    about: dict[str, Any] = field(default_factory=dict)
    """How it was made."""
    path: Path | None = None
    """Its folder, where the arrays are files: then they are mapped into memory, and cost none."""

    def __getstate__(self) -> dict[str, Any]:
        """Hand data workers the path instead of the pixels."""
        state = dict(vars(self))
        if self.path is not None:
            state["frames"] = state["parts"] = None
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Map the files again."""
        self.__dict__.update(state)
        if self.path is not None:
            opened = read_recording(self.path)
            self.frames, self.parts = opened.frames, opened.parts


def read_recording(folder: Path) -> Recording:
    """Return a recording in a folder, its arrays mapped into memory.

    Raises:
        UsageError: The folder holds none, or its files cannot be read.
    """
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8")) if (folder / ABOUT).exists() else {}
        frames = np.load(folder / FRAMES, mmap_mode="r", allow_pickle=False)
        files = {part: folder / f"{part}.npy" for part in PARTS}
        parts = {
            part: np.load(file, mmap_mode="r", allow_pickle=False) for part, file in files.items() if file.exists()
        }
    except (OSError, ValueError) as error:
        raise UsageError(f"{folder} holds no readable recording ({error})") from error
    for part, values in parts.items():
        if len(values) != len(frames):
            raise UsageError(f"{folder} has {len(frames)} frames and {len(values)} {part}; record it again")
    return Recording(str(about.get("game", folder.name)), frames, parts, about, folder)


class FrameStackDataset(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """Stacks of consecutive frames with the stacks before and after (TOV-VICReg, arXiv 2209.10901).

    Neighbours lie one whole stack away, so they share no frame with it; at the ends they are moved inwards and may
    coincide with it in part or whole.

    Args:
        frames: (n, H, W) uint8 in time order.
        stack: Frames of an observation, oldest first; paper: 3.
        stride: Steps from one frame of a stack to the next.
        episode_starts: (n,) bool, True at the first frame of an episode: then no stack crosses an episode's border
            and neighbours are moved inwards there too. Default: borders are ignored, as published.
        drop_blank: Leave out observations with a frame of which more than 99 % of the pixels are equal.

    Raises:
        UsageError: Frames of another type or shape, or too few of them.
    """

    def __init__(
        self,
        frames: np.ndarray,
        stack: int = 3,
        stride: int = 1,
        episode_starts: np.ndarray | None = None,
        drop_blank: bool = False,
    ) -> None:
        if isinstance(frames, Tensor):
            frames = frames.numpy()
        if frames.ndim != 3 or frames.dtype != np.uint8:
            raise UsageError(
                f"frames are {frames.dtype} of shape {frames.shape}; (n, height, width) of uint8, 0 to 255, is needed"
            )
        if stack < 1 or stride < 1:
            raise UsageError(f"stack is {stack} and stride {stride}; both must be at least 1")
        if len(frames) < 3 * stack * stride:
            raise UsageError(
                f"{len(frames)} frames are too few for triplets of {stack} frames; "
                f"at least {3 * stack * stride} are needed"
            )
        self.frames, self.stack, self.stride = frames, stack, stride
        self.span = (stack - 1) * stride + 1
        self.starts, self.first, self.last = self._places(episode_starts)
        if drop_blank:
            blank = blank_frames(frames)
            kept = ~np.any([blank[self.starts + offset] for offset in range(0, self.span, stride)], axis=0)
            self.starts, self.first, self.last = self.starts[kept], self.first[kept], self.last[kept]
        if len(self.starts) == 0:
            raise UsageError(f"none of {len(frames)} frames is left: episodes are too short, or all frames are blank")

    def _places(self, episode_starts: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return where stacks begin, and for each the first and the last beginning its neighbours may have."""
        count = len(self.frames) - self.span + 1
        starts = np.arange(count)
        if episode_starts is None:
            return starts, np.zeros_like(starts), np.full_like(starts, count - 1)
        if len(episode_starts) != len(self.frames):
            raise UsageError(f"{len(self.frames)} frames have {len(episode_starts)} episode_starts; one each is needed")
        borders = np.flatnonzero(np.asarray(episode_starts, dtype=bool))
        borders = np.unique(np.concatenate([[0], borders]))
        ends = np.append(borders[1:], len(self.frames))
        episode = np.searchsorted(borders, starts, side="right") - 1
        inside = starts + self.span <= ends[episode]
        return starts[inside], borders[episode][inside], (ends[episode] - self.span)[inside]

    def __len__(self) -> int:
        """Return the number of observations."""
        return len(self.starts)

    def observation(self, start: int) -> Tensor:
        """Return the stack that begins at frame `start`, (stack, H, W) uint8."""
        return torch.from_numpy(np.array(self.frames[start : start + self.span : self.stride]))

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return observation number `index`, the one before and the one after, (stack, H, W) uint8 each."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"observation {index} of {len(self)}")
        start, away = int(self.starts[index]), self.stack * self.stride
        before = max(int(self.first[index]), start - away)
        after = min(int(self.last[index]), start + away)
        return self.observation(start), self.observation(before), self.observation(after)


class FrameSource(Source):
    """The stacks of recordings as images of `stack` channels; what is seen in them is their class.

    Args:
        name: The source as the user named it.
        recordings: All of one frame size.
        stack: Frames of an observation.

    Attributes:
        sets: The stacks of each recording.

    Raises:
        UsageError: No recording, one too short, or frames of different sizes.
    """

    def __init__(self, name: str, recordings: Sequence[Recording], stack: int = 3) -> None:
        if not recordings:
            raise UsageError(f"{name} holds no recording")
        sizes = {recording.frames.shape[1:]: recording.name for recording in recordings}
        if len(sizes) > 1:
            listed = " and ".join(f"{shape[0]}x{shape[1]} ({name})" for shape, name in list(sizes.items())[:2])
            raise UsageError(f"the frames of {name} differ in size: {listed}; bring them to one size")
        self.name, self.recordings, self.in_chans = name, list(recordings), stack
        self.sets = [self.triplet_set(recording) for recording in self.recordings]
        self.ends = np.cumsum([len(stacks) for stacks in self.sets])
        names = sorted({recording.name for recording in recordings})
        if len(names) > 1:
            self.class_names = names
            classes = [names.index(recording.name) for recording in recordings]
            self.labels = np.repeat(classes, [len(stacks) for stacks in self.sets]).astype(np.int64)

    def __getstate__(self) -> dict[str, Any]:
        """Hand data workers the recordings (their paths, where they have one) and no other view of the pixels."""
        return {name: value for name, value in vars(self).items() if name != "sets"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Form the stacks again."""
        self.__dict__.update(state)
        self.sets = [self.triplet_set(recording) for recording in self.recordings]

    def triplet_set(
        self, recording: Recording, *, episodes: bool = False, drop_blank: bool = False
    ) -> FrameStackDataset:
        """Return the triplets of one recording; the complaint about one names it."""
        borders = recording.parts.get("episode_starts")
        if episodes and borders is None:
            raise UsageError(f"the recording {recording.name} does not tell where episodes start; set it without")
        try:
            return FrameStackDataset(
                recording.frames, self.in_chans, episode_starts=borders if episodes else None, drop_blank=drop_blank
            )
        except UsageError as error:
            raise UsageError(f"{recording.name} in {self.name}: {error}") from error

    def triplets(self, *, respect_episodes: bool = False, drop_blank: bool = False) -> TripletSource:
        """Return the same recordings as triplets in time."""
        return TripletSource(self, respect_episodes=respect_episodes, drop_blank=drop_blank)

    def place(self, index: int) -> tuple[int, int]:
        """Return the recording and the place in it of observation number `index`."""
        number = int(np.searchsorted(self.ends, index, side="right"))
        return number, index - (int(self.ends[number - 1]) if number else 0)

    def __len__(self) -> int:
        """Return the number of observations."""
        return int(self.ends[-1])

    def key(self, index: int) -> str:
        """Return the recording and the first frame of observation number `index`."""
        number, place = self.place(index)
        return f"{self.recordings[number].name}/{number}/{int(self.sets[number].starts[place]):06d}"

    def read(self, index: int) -> Sample:
        """Return observation number `index`, (stack, H, W)."""
        number, place = self.place(index)
        stacks = self.sets[number]
        label = -1 if self.labels is None else int(self.labels[index])
        return Sample(stacks.observation(int(stacks.starts[place])), label, self.key(index))

    def fingerprint(self) -> str:
        """Return a short hash of names, lengths and the frames at both ends."""
        digest = hashlib.sha256(str(self.in_chans).encode())
        for recording in self.recordings:
            about = json.dumps(recording.about, sort_keys=True, default=str)
            digest.update(f"{recording.name}{recording.frames.shape}{about}".encode())
            digest.update(recording.frames[[0, -1]].tobytes())
        return digest.hexdigest()[:16]


class TripletSource(FrameSource):
    """Triplets of stacks in time as images of 3 · `stack` channels: at t, before, after."""

    def __init__(self, source: FrameSource, *, respect_episodes: bool = False, drop_blank: bool = False) -> None:
        self.respect_episodes, self.drop_blank = respect_episodes, drop_blank
        super().__init__(source.name, source.recordings, source.in_chans)

    def triplet_set(self, recording: Recording, **options: bool) -> FrameStackDataset:
        """Return the triplets of one recording, as this source was told to form them."""
        return super().triplet_set(recording, episodes=self.respect_episodes, drop_blank=self.drop_blank)

    def read(self, index: int) -> Sample:
        """Return triplet number `index`, (3 · stack, H, W)."""
        number, place = self.place(index)
        label = -1 if self.labels is None else int(self.labels[index])
        return Sample(torch.cat(self.sets[number][place]), label, self.key(index))


def open_frames(
    path: str, *, stack: int = 3, size: int = 84, include: str | None = None, exclude: str | None = None
) -> FrameSource:
    """Open `frames:PATH`.

    Args:
        path: A recording's folder or a folder of them; a `.npy` array (n, H, W) of uint8, or a folder of those;
            DQN Replay's `GAME/observation_1.gz`; or a folder of images in the order of their names, each sub-folder a
            recording of its own.
        stack: Frames of an observation.
        size: Side that images are reduced to, pixels; arrays are taken as they are.
        include: Globs of the images to take, see `patchloom.base.source_options.choose`; default: all.
        exclude: Globs of images to leave out.

    Raises:
        UsageError: There is nothing of the kind, or globs are given for arrays.
    """
    root = existing(path)
    if not root.exists():
        raise UsageError(
            f"there are no frames at {path}; record some with: patchloom data atari --games Pong --out {path}"
        )
    recordings = list(_found(root))
    if recordings and (include is not None or exclude is not None):
        raise UsageError(f"{path} holds arrays, and include and exclude choose among images; leave them out")
    if not recordings:
        recordings = list(_image_sequences(root, size, include, exclude))
    if not recordings:
        raise UsageError(
            f"no frames in {root.resolve()} or below (looked for {FRAMES}, .npy, observation_*.gz, images)"
        )
    return FrameSource(f"frames:{path}", recordings, stack)


def load_dqn_replay(path: str | Path, limit: int = REPLAY_LIMIT) -> np.ndarray:
    """Return the first frames of a file of the DQN Replay data set (`GAME/observation_1.gz`).

    Args:
        path: A gzipped `.npy` array (n, H, W) of uint8; only as much of it as is wanted is read.
        limit: Most frames; paper: 100 000.

    Raises:
        UsageError: The file is no such array.
    """
    try:
        with gzip.open(path, "rb") as file:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, kind = read(file)
            if fortran or len(shape) != 3 or kind != np.uint8:
                raise ValueError(f"an array of {kind} of shape {shape}")
            shape = (min(limit, shape[0]), *shape[1:])
            data = file.read(int(np.prod(shape)))
            return np.frombuffer(data, np.uint8).reshape(shape)
    except (OSError, EOFError, ValueError) as error:
        raise UsageError(
            f"{path} holds no gzipped array of frames ({error}); (n, height, width) of uint8 is needed"
        ) from error


def blank_frames(frames: np.ndarray) -> np.ndarray:
    """Return (n,) bool: True where more than 99 % of a frame's pixels are equal."""
    most = BLANK_SHARE * frames[0].size
    return np.array([np.bincount(frame.ravel(), minlength=256).max() > most for frame in frames], dtype=bool)


def _found(root: Path) -> Iterator[Recording]:
    """Yield the arrays of frames at or below a path, in the order of their paths."""
    if root.is_file():
        files = [root]
    else:
        files = sorted([*root.rglob("*.npy"), *root.rglob("*observation*.gz")])
    recorded = {file.parent for file in files if file.name == FRAMES}
    for file in files:
        if file.name == FRAMES:
            yield read_recording(file.parent)
        elif file.suffix == ".gz":
            yield Recording(file.parent.name, load_dqn_replay(file), about={"file": file.name})
        elif file.suffix == ".npy" and file.parent not in recorded:
            try:
                yield Recording(file.stem, np.load(file, mmap_mode="r", allow_pickle=False))
            except (OSError, ValueError) as error:
                raise UsageError(f"{file} is no array that can be read ({error})") from error


def _image_sequences(root: Path, size: int, include: str | None, exclude: str | None) -> Iterator[Recording]:
    """Yield each folder of images as a recording: grey, reduced to `size` pixels; broken images are left out."""
    folders = [root, *sorted(path for path in root.rglob("*") if path.is_dir())] if root.is_dir() else []
    values = _settled(root)
    for folder in folders:
        files = sorted(file for file in folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
        by_name = {printable(file.relative_to(root).as_posix()): file for file in files}
        files = [by_name[name] for name in choose(by_name, include, exclude)]
        frames = []
        for file in files:
            with suppress(UnreadableImageError):
                pages = decode_frames(file, printable(file.name), values)
                frames += [reduced(np.rint(levels(page).numpy()), size) for page in pages]
        if frames:
            name = printable(folder.name)
            yield Recording(name, np.stack(frames), about={"folder": name, "images": len(frames)})


def _settled(root: Path) -> ValueRange:
    """Return the one value range of all images below a folder, where they are deeper than 8 bits; says what is made."""
    files = sorted(file for file in root.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
    survey = Survey.of_files((printable(files[place].name), files[place]) for place in spread(len(files), HEADERS))
    values = survey.settled(printable(root), ValueRange())
    if values != ValueRange():
        notice(f"{printable(root)}: frames are held with 8 bits; what is deeper is brought to them by that range")
    return values


def reduced(frame: np.ndarray, size: int) -> np.ndarray:
    """Return a frame as (size, size) uint8, each pixel the mean over the area it covers.

    Args:
        frame: (H, W), 0 … 255.
        size: Side in pixels; an area shared by two pixels counts for both in part, as OpenCV's `INTER_AREA` does.
    """
    if frame.shape == (size, size):
        return frame.astype(np.uint8)
    down, across = (_shares(side, size) for side in frame.shape)
    return np.rint(down @ frame.astype(np.float32) @ across.T).clip(0, 255).astype(np.uint8)


_SHARES: dict[tuple[int, int], np.ndarray] = {}


def _shares(before: int, after: int) -> np.ndarray:
    """Return (after, before) weights: how much of each old pixel lies in each new one; rows sum to 1."""
    if (before, after) not in _SHARES:
        edges = np.arange(after + 1) * before / after
        low = np.maximum(edges[:-1, None], np.arange(before)[None])
        high = np.minimum(edges[1:, None], np.arange(1, before + 1)[None])
        shares = np.clip(high - low, 0, None)
        _SHARES[before, after] = (shares / shares.sum(1, keepdims=True)).astype(np.float32)
    return _SHARES[before, after]
