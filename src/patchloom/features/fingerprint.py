"""What makes features what they are, as short hashes: an encoder's weights, and the images and labels of a source.

>>> import timm
>>> small = timm.create_model("vit_tiny_patch16_224", depth=1)
>>> weights_hash(small) == weights_hash(small)
True
"""

from __future__ import annotations

import hashlib
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from patchloom.data.base import Source, StreamSource, reading
from patchloom.encoders import Encoder

# Bytes of a tensor that share a checksum.
BLOCK = 2**16


def weights_hash(encoder: Encoder | None) -> str:
    """Return a hash of all that makes an encoder's output: weights, buffers, structure, arguments, normalisation."""
    if encoder is None:
        return "pixels"
    creation_args = getattr(encoder, "patchloom_args", None) or getattr(encoder, "_model_args", None)
    normalised = [(getattr(encoder, "pretrained_cfg", None) or {}).get(part) for part in ("mean", "std")]
    text = [
        repr(encoder),
        repr(creation_args),
        repr([list(part or ()) for part in normalised]),
        str(getattr(encoder, "global_pool", None)),
    ]
    return digest("\0".join([*text, *_tensor_hashes(encoder)]).encode())


def state_hash(module: nn.Module) -> str:
    """Return a hash of a module's weights and buffers, by name."""
    return digest("\0".join(_tensor_hashes(module)).encode())


def source_hash(source: Source | StreamSource) -> str:
    """Return a hash of the images and labels a source lists."""
    digest = hashlib.sha256(f"{type(source).__name__}\0{place_of_source(source.name)}\0{source.fingerprint()}".encode())
    digest.update(f"{source.in_chans}\0{source.class_names}".encode(errors="surrogateescape"))
    if how := reading(source):
        digest.update(repr(how).encode())
    if source.labels is not None:
        digest.update(np.ascontiguousarray(source.labels).tobytes())
    return digest.hexdigest()[:32]


def place_of_source(name: str) -> str:
    """Return the absolute path of a source that is a path, else its name."""
    return str(Path(name).resolve()) if Path(name).exists() else name


def _tensor_hashes(module: nn.Module) -> list[str]:
    """Return name and hash of every parameter and buffer."""
    tensors = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing lets go of the interpreter
        hashes = list(pool.map(_tensor_hash, [tensor for _, tensor in tensors]))
    return [f"{name} {value}" for (name, _), value in zip(tensors, hashes, strict=True)]


def _tensor_hash(tensor: Tensor) -> str:
    """Return a hash of shape and bytes: SHA-256 over the CRC of every block, four times as fast as over the bytes.

    A CRC finds every change within 32 bits for certain, and any other but one in four thousand million, per block.
    """
    data: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    blocks = np.array([zlib.crc32(data[at : at + BLOCK]) for at in range(0, len(data), BLOCK)], dtype=np.uint32)
    return digest(f"{tensor.dtype} {tuple(tensor.shape)}".encode() + blocks.tobytes())


def digest(data: bytes) -> str:
    """Return a short hash of bytes."""
    return hashlib.sha256(data).hexdigest()[:32]
