"""Tokenizers: from pixels to indices and back.

>>> import torch
>>> from patchloom.tokenizers import CentroidTokenizer
>>> images = torch.randint(0, 256, (40, 3, 16, 16), dtype=torch.uint8)
>>> tokenizer = CentroidTokenizer.fit(images, k=8, patch_size=4, iters=2)
>>> tokenizer.encode(images).shape
torch.Size([40, 4, 4])
"""

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
    from patchloom.tokenizers.centroid import CentroidTokenizer
    from patchloom.tokenizers.commands import fit_codebook, show_codebook
    from patchloom.tokenizers.tokenizer import Tokenizer, open_tokenizer

__getattr__, __dir__, _ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "centroid": ["CentroidTokenizer"],
        "commands": ["fit_codebook", "show_codebook"],
        "tokenizer": ["Tokenizer", "open_tokenizer"],
    },
)

__all__ = ["CentroidTokenizer", "Tokenizer", "fit_codebook", "open_tokenizer", "show_codebook"]
