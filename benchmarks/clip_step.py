"""A step of `align clip` against open_clip's own training step, of equal towers; and what the gradient cache costs.

    python -m benchmarks.clip_step [--vision vit_tiny_patch16_224] [--batch 16] [--rounds 5] [--write]

open_clip's step is that of its `train_one_epoch` on one device: both towers, `ClipLoss`, AdamW, the bound on the scale.
Captions are sentences of 8 to 20 words. The gradient cache: a batch 8 times as large, in chunks of the batch, against a
plain step of that size.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor

from benchmarks.harness import alternate, machine, markdown_table, mean_and_deviation, paired_ratio, rewrite
from patchloom.encoders import create_backbone, image_size
from patchloom.systems.clip.losses import contrastive_loss
from patchloom.systems.clip.model import CLIP, chunked
from patchloom.systems.clip.text import TextTower, tokenize

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 384, "heads": 6, "layers": 6}
EMBED = 384
WORDS = (
    *(["a", "photo", "of", "the", "small", "brown", "dog", "that", "runs", "on", "green", "grass", "by", "an", "old"]),
    *(["stone", "wall", "near", "water", "under", "trees"]),
)
Step = Callable[[], None]


def captions(count: int) -> list[str]:
    """Return sentences of 8 to 20 words, no two alike."""
    return [" ".join([*WORDS[: 8 + number % 12], f"number {number}"]) for number in range(count)]


def batch_of(count: int, side: int, device: str) -> dict[str, Tensor]:
    """Return images and captions."""
    texts = [tokenize(caption, TEXT["context_length"]) for caption in captions(count)]
    images = torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(0))
    tokens, ids = torch.stack([text.tokens for text in texts]), torch.stack([text.text_id for text in texts])
    return {"images": images.to(device), "tokens": tokens.to(device), "ids": ids.to(device)}


def optimizer_of(model: torch.nn.Module) -> torch.optim.Optimizer:
    """Return AdamW as both train by it."""
    return torch.optim.AdamW(model.parameters(), lr=5e-4, betas=(0.9, 0.98), eps=1e-6, fused=True)


def theirs(model: Any, batch: dict[str, Tensor], autocast: Callable[[], Any]) -> Step:
    """Return open_clip's step."""
    optimizer, loss = optimizer_of(model), open_clip.ClipLoss()

    def step() -> None:
        optimizer.zero_grad()
        with autocast():
            value = loss(*model(batch["images"], batch["tokens"]))
        value.backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))

    return step


def ours(model: CLIP, batch: dict[str, Tensor], autocast: Callable[[], Any], chunk: int | None = None) -> Step:
    """Return the step of `align clip`."""
    optimizer = optimizer_of(model)

    def step() -> None:
        with autocast():
            images = chunked(partial(model.encode_image, normalize=True), batch["images"], size=chunk)
            texts = model.encode_text(batch["tokens"], normalize=True, chunk_size=chunk)
            value = contrastive_loss(images, texts, model.logit_scale.exp(), batch["ids"]).loss
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.clamp_scale()

    return step


def main() -> None:
    """Time all in turn and print or write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vision", default="vit_tiny_patch16_224")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--write", action="store_true", help="write the table to docs/performance.md")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    autocast = partial(torch.autocast, device, torch.bfloat16, enabled=options.precision == "bf16")
    vision = {"timm_model_name": options.vision, "timm_pool": "", "timm_proj": "linear"}
    reference = open_clip.CustomTextCLIP(EMBED, vision, TEXT).to(device).train()

    def towers() -> CLIP:
        model = CLIP(create_backbone(options.vision), TextTower(**TEXT, output_dim=EMBED))
        model.load_state_dict(reference.state_dict())
        return model.to(device).train()

    model = towers()
    small = batch_of(options.batch, image_size(model.visual.trunk)[0], device)
    large = batch_of(8 * options.batch, image_size(model.visual.trunk)[0], device)

    def timed(call: Step) -> Step:
        def run() -> None:
            call()
            if device == "cuda":
                torch.cuda.synchronize()

        return run

    steps = {
        "open_clip": theirs(reference, small, autocast),
        "align clip": ours(model, small, autocast),
        "8 x the batch": ours(towers(), large, autocast),
        "8 x the batch, gradient cache": ours(towers(), large, autocast, options.batch),
    }
    # On a CPU the processor's time counts, which others on the machine do not add to.
    clock = time.perf_counter if device == "cuda" else time.process_time
    seconds = alternate({name: timed(step) for name, step in steps.items()}, rounds=options.rounds, clock=clock)
    speed = {name: mean_and_deviation([1000 * s for s in values], 0) for name, values in seconds.items()}
    faster = paired_ratio(seconds["open_clip"], seconds["align clip"])
    dearer = paired_ratio(seconds["8 x the batch, gradient cache"], seconds["8 x the batch"])
    rows = [
        ["open_clip's step", speed["open_clip"], "1"],
        ["`align clip`", speed["align clip"], f"{faster:.2f} × as fast"],
        ["`align clip`, 8 × the batch", speed["8 x the batch"], "1"],
        [f"the same in chunks of {options.batch}", speed["8 x the batch, gradient cache"], f"{dearer:.2f} × the time"],
    ]
    name = f"{options.vision}, text width {TEXT['width']} and {TEXT['layers']} blocks, batch {options.batch}"
    text = (
        f"{machine()}\n\n{markdown_table([f'{name}, {options.precision}', 'ms', ''], rows)}\n\n"
        f"Targets: at least 1.0 × as fast as open_clip; the gradient cache at most 1.35 × the time."
    )
    print(text)
    if options.write:
        rewrite(PAGE, "clip_step", text)


if __name__ == "__main__":
    main()
