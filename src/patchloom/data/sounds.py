"""Sounds as spectrograms, and other signals as they are (EEG): WAV, FLAC, OGG, MP3 (extra: audio) and arrays.

Spectrograms are those of AST (Gong et al. 2021, arXiv 2104.01778): Kaldi's log-mel filter banks of 16 kHz, 128 tones,
a frame each 10 ms, normalised by the mean and deviation of AudioSet.

>>> log_mel(torch.zeros(16000)).shape
torch.Size([98, 128])
"""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from patchloom.data.base import Sample, UnreadableImageError
from patchloom.data.kinds import KINDS
from patchloom.data.pictured import PicturedSource
from patchloom.errors import MissingExtraError, UsageError

SOUNDS = {".wav", ".flac", ".ogg", ".mp3", ".aiff"}
RATE, BINS, WINDOW, SHIFT = 16000, 128, 400, 160
MEAN, DEVIATION = -4.2677393, 4.5689974
"""Of AudioSet's values, as ViT-Lens takes them; AST has twice the deviation."""


class SoundSource(PicturedSource):
    """Sounds of a folder as log-mel spectrograms, or arrays of signals.

    A sample is (128, T) float32, tones by frames: cut at T frames, or with silence behind.

    Args:
        path: The folder, or one file; classes, pictures and captions as `PicturedSource` has them. Arrays (`.npy`) are
            spectrograms (frames, 128) that are used as they are.
        labels: See there.
        include: Globs of the files to take; default: all.
        exclude: Globs of files to leave out.
        frames: Frames T of a sample, 10 ms each.

    Raises:
        UsageError: No such folder, or no sound in it.
    """

    kind = KINDS["signal"]
    in_chans = BINS

    def __init__(
        self,
        path: str | Path,
        labels: str = "auto",
        include: str | None = None,
        exclude: str | None = None,
        frames: int = 512,
    ) -> None:
        super().__init__(path, SOUNDS | {".npy"}, "sounds", labels, include, exclude)
        self.frames = frames

    def read(self, index: int) -> Sample:
        """Return sound number `index`, (128, T) float32, with its `pictures` and, where there are any, `caption`.

        Raises:
            UnreadableImageError: It cannot be read, is shorter than a frame, or holds values that are not finite.
        """
        key = self.key(index)
        try:
            found = self._spectrogram(self.files[index])
        except UsageError as error:
            raise UnreadableImageError(key, str(error)) from error
        found = F.pad(found[: self.frames], (0, 0, 0, max(0, self.frames - len(found))))
        return Sample(found.T.contiguous(), self.label(index), key, self.named(index))

    @staticmethod
    def _spectrogram(file: Path) -> Tensor:
        if file.suffix.lower() == ".npy":
            try:
                array = np.load(file, allow_pickle=False)
            except (OSError, ValueError, EOFError) as error:
                raise UsageError(f"it is damaged ({' '.join(str(error).split())[:120]})") from error
            if array.ndim != 2 or array.shape[1] != BINS or array.dtype.kind not in "fiu":
                raise UsageError(
                    f"a spectrogram is (frames, {BINS}) numbers, and this is {array.shape} of {array.dtype}"
                )
            found = torch.from_numpy(array.astype(np.float32))
        else:
            found = (log_mel(read_sound(file)) - MEAN) / DEVIATION
        if not torch.isfinite(found).all():
            raise UsageError("it holds NaN or infinite values")
        return found


def read_sound(file: Path) -> Tensor:
    """Return a sound (L,) float32 in [-1, 1] at 16 kHz, its channels averaged.

    Raises:
        UsageError: It cannot be read.
        MissingExtraError: soundfile is not here.
    """
    try:
        import soundfile
    except (ImportError, OSError) as error:
        raise MissingExtraError("soundfile", "audio", "reading sounds") from error
    try:
        values, rate = soundfile.read(file, dtype="float32", always_2d=True)
    except (OSError, RuntimeError) as error:
        raise UsageError(f"it is damaged ({' '.join(str(error).split())[:120]})") from error
    sound = values.mean(1)
    if rate != RATE and len(sound):
        from scipy.signal import resample_poly

        common = math.gcd(RATE, int(rate))
        sound = resample_poly(sound, RATE // common, int(rate) // common).astype(np.float32)
    return torch.from_numpy(np.ascontiguousarray(sound))


def log_mel(sound: Tensor, bins: int = BINS) -> Tensor:
    """Return Kaldi's log-mel filter banks (T, bins) of a sound (L,) at 16 kHz: windows of 25 ms (Hann), each 10 ms.

    Raises:
        UsageError: It is shorter than a window.
    """
    if len(sound) < WINDOW:
        raise UsageError(f"it has {len(sound)} values at 16 kHz, less than a window of {WINDOW}")
    frames = (sound - sound.mean()).unfold(0, WINDOW, SHIFT)
    frames = frames - frames.mean(1, keepdim=True)
    before = torch.cat([frames[:, :1], frames[:, :-1]], 1)
    frames = (frames - 0.97 * before) * torch.hann_window(WINDOW, periodic=False)
    power = torch.fft.rfft(F.pad(frames, (0, 512 - WINDOW))).abs().square()
    return (power[:, :-1] @ _filters(bins).T).clamp_min(torch.finfo(torch.float32).eps).log()


@cache
def _filters(bins: int) -> Tensor:
    """Return triangles (bins, 256), evenly spread over mel from 20 Hz to 8 kHz."""
    low, high = (1127.0 * math.log(1 + hertz / 700.0) for hertz in (20.0, RATE / 2))
    edges = low + (high - low) / (bins + 1) * torch.arange(bins + 2, dtype=torch.float64)
    mel = 1127.0 * (1 + torch.arange(256, dtype=torch.float64) * (RATE / 512) / 700.0).log()
    rising = (mel - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - mel) / (edges[2:] - edges[1:-1])[:, None]
    return torch.minimum(rising, falling).clamp_min(0).float()
