"""A training step of CCViT-B/16 at 224 px against `BeitForMaskedImageModeling` of transformers, of equal size.

    python -m benchmarks.ccvit_step [--batch 8] [--rounds 5] [--write]

Ours runs 14 blocks (12 and a condenser of 2), a token head and a pixel head, and finds tokens and pastes centroids
inside the step; the peer runs 12 blocks and a token head, and is handed its tokens. Both: forward, backward, fused
AdamW. Peak memory is that of a process of its own.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.harness import alternate, machine, markdown_table, mean_and_deviation, paired_ratio, rewrite

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
SIDE, PATCHES, MASKED, REPLACED, VOCAB = 224, 196, 75, 20, 8192


def inputs(batch: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return images in [0, 1], hidden and replaced patches."""
    generator = torch.Generator().manual_seed(0)
    order = torch.rand(batch, PATCHES, generator=generator).argsort(1)
    masked, replaced = order < MASKED, (order >= MASKED) & (order < MASKED + REPLACED)
    return torch.rand(batch, 3, SIDE, SIDE, generator=generator).to(device), masked.to(device), replaced.to(device)


def ours(batch: int, device: str, precision: str) -> Callable[[], None]:
    """Return one training step of CCViT-B/16, tokens found inside."""
    from patchloom.encoders import create_encoder, normalize
    from patchloom.encoders.patches import normalize_patches, patchify
    from patchloom.systems.ccvit.model import CentroidMIM, CentroidMIMLoss
    from patchloom.tokenizers.centroid import CentroidTokenizer

    images, masked, replaced = inputs(batch, device)
    generator = torch.Generator().manual_seed(1)
    tokenizer = CentroidTokenizer(torch.rand(VOCAB, 768, generator=generator), 16).to(device)
    encoder = create_encoder("ccvit_base_patch16_224")
    model = CentroidMIM(encoder, VOCAB).to(device).train()
    loss = CentroidMIMLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    supervised = masked | replaced

    def step() -> None:
        with torch.no_grad():
            patches = patchify(images, 16)[supervised]
            ids = tokenizer.nearest(patches)
            table = torch.zeros_like(masked, dtype=torch.int64)
            table[supervised] = ids
            corrupted = normalize(tokenizer.replace(images, replaced, ids=table), encoder)
            targets = normalize_patches(patches)
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            output = model(corrupted, masked, supervised)
        total = loss(output, ids, targets)["loss"]
        total.backward()
        optimizer.step()
        optimizer.zero_grad()  # as the engine and transformers' Trainer do

    return step


def peer(batch: int, device: str, precision: str) -> Callable[[], None]:
    """Return one training step of transformers' BEiT-B/16 with shared relative positions."""
    from transformers import BeitConfig, BeitForMaskedImageModeling

    images, masked, _ = inputs(batch, device)
    config = BeitConfig(
        vocab_size=VOCAB,
        use_mask_token=True,
        use_shared_relative_position_bias=True,
        use_absolute_position_embeddings=False,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        drop_path_rate=0.0,
        layer_scale_init_value=0.1,
    )
    model = BeitForMaskedImageModeling._from_config(config, attn_implementation="sdpa").to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    ids = torch.randint(VOCAB, (int(masked.sum()),), generator=torch.Generator().manual_seed(1)).to(device)

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            total = model(pixel_values=images, bool_masked_pos=masked, labels=ids).loss
        total.backward()
        optimizer.step()
        optimizer.zero_grad()  # as the engine and transformers' Trainer do

    return step


CANDIDATES = {"ours": ours, "peer": peer}


def peak_memory(name: str, batch: int, device: str, precision: str) -> float:
    """Return the peak memory of three steps in GiB: of the GPU, or of a process of its own."""
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        step = CANDIDATES[name](batch, device, precision)
        for _ in range(3):
            step()
        return torch.cuda.max_memory_allocated() / 2**30
    command = [sys.executable, "-m", "benchmarks.ccvit_step", "--batch", str(batch), "--precision", precision]
    done = subprocess.run([*command, "--memory", name], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def main() -> None:
    """Time both in turn and print or write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--write", action="store_true", help="write the table to docs/performance.md")
    parser.add_argument("--memory", choices=list(CANDIDATES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.memory:
        step = CANDIDATES[options.memory](options.batch, device, options.precision)
        for _ in range(3):
            step()
        # Not getrusage: what it says of a child begins with the peak of the parent.
        status = Path("/proc/self/status").read_text()
        print(int(status.split("VmHWM:")[1].split()[0]) / 2**20)
        return

    def timed(call: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            call()
            if device == "cuda":
                torch.cuda.synchronize()

        return run

    steps = {name: timed(make(options.batch, device, options.precision)) for name, make in CANDIDATES.items()}
    seconds = alternate(steps, rounds=options.rounds, warmup=2)
    del steps
    memory = {name: peak_memory(name, options.batch, device, options.precision) for name in CANDIDATES}
    ratio = paired_ratio(seconds["peer"], seconds["ours"])
    titles = {
        "ours": "CCViT-B/16, 14 blocks, two heads, tokens in the step",
        "peer": "transformers BEiT-B/16, 12 blocks",
    }
    rows = [
        [
            title,
            mean_and_deviation([options.batch / s for s in seconds[name]]),
            f"{memory[name]:.2f}",
            f"{ratio:.2f} ×" if name == "ours" else "1",
            f"{ratio * 14 / 12:.2f} ×" if name == "ours" else "1",
        ]
        for name, title in titles.items()
    ]
    header = [f"batch {options.batch}, {options.precision}", "images/s", "peak GiB", "speed", "speed per block"]
    text = f"{machine()}\n\n{markdown_table(header, rows)}\n\nTarget: at least 1.0 × (1.15 × per block), less memory."
    print(text)
    if options.write:
        rewrite(PAGE, "ccvit_step", text)


if __name__ == "__main__":
    main()
