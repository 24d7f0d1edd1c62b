"""One Hyena layer against attention, by number of tokens, and against the published operator's arithmetic.

    python -m benchmarks.hyena_layer [--dim 96] [--sides 16 32 64 128] [--batch 1] [--rounds 3] [--write]

A step is forward and backward. Attention is timed fused (SDPA) and with its matrix written out; the published operator
transforms twice padded planes whole, and once more for nothing. Memory is what a step keeps for its backward pass. The
plot shows from how many tokens on Hyena is the faster one.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

from benchmarks.harness import alternate, machine, markdown_table, paired_ratio, rewrite
from patchloom.encoders.hyena import HyenaND

PAGE = Path(__file__).parents[1] / "docs" / "systems" / "hyena_nd.md"
PLOT = PAGE.parents[1] / "pictures" / "hyena_crossover.png"
LABELS = {"hyena": "Hyena", "published": "published operator", "fused": "SDPA", "written": "softmax written out"}
MATRIX_LIMIT = 4096
"""Tokens up to which attention's matrix is written out."""


class Published(nn.Module):
    """The arithmetic of `timm/models/layers/hyena2d.py`, order 2, joint filter, with the weights of ours."""

    def __init__(self, ours: HyenaND) -> None:
        super().__init__()
        self.ours = ours

    def kernel(self, side: int) -> Tensor:
        """Return (C, side, side): every place's features are written out before the first layer."""
        filters = self.ours.filters
        z, t = filters.z[0].repeat(1, side, 1, 1), filters._times(0, side)
        x = torch.cat((z.transpose(-2, -3), z), dim=-1)
        for layer in filters.networks[0][:-1]:
            x = torch.sin(filters.freq * layer(x))
        each = [torch.exp(-t * rates.abs()) for rates in filters.deltas]
        decay = torch.einsum("ik,mk->imk", *each)
        return (filters.networks[0][-1](x)[0] * decay).permute(2, 0, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, N, C) of (B, N, C)."""
        side = self.ours.grid[0]
        u = self.ours.in_proj(x).unflatten(1, (side, side)).permute(0, 3, 1, 2)
        last, gate, v = self.ours.short_filter(u).split(self.ours.dim, dim=1)
        v, length = v * gate, 2 * side
        spectrum = torch.fft.rfft2(v, s=(length, length))
        kernel = torch.fft.rfft2(self.kernel(side), s=(length, length)) / length
        torch.fft.irfft(spectrum * kernel, n=length, norm="forward")  # as published; nothing reads it
        y = torch.fft.irfft2(spectrum * kernel, s=(length, length))[..., :side, :side]
        y = (y + v * self.ours.skip.view(-1, 1, 1)) * last
        return self.ours.out_proj(y.permute(0, 2, 3, 1)).flatten(1, 2)


class WrittenOut(nn.Module):
    """Attention whose matrix stands in memory."""

    def __init__(self, fused: Attention) -> None:
        super().__init__()
        self.fused = fused

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, N, C) of (B, N, C)."""
        q, k, v = self.fused.qkv(x).unflatten(2, (3, self.fused.num_heads, -1)).permute(2, 0, 3, 1, 4)
        weights = F.softmax(q @ k.transpose(-1, -2) * self.fused.scale, dim=-1)
        return self.fused.proj((weights @ v).transpose(1, 2).flatten(2))


def step(layer: nn.Module, x: Tensor) -> None:
    """Go forth and back once."""
    layer(x).sum().backward()
    if x.is_cuda:
        torch.cuda.synchronize()


def kept(layer: nn.Module, x: Tensor) -> int:
    """Return how many bytes a forward pass keeps for the backward pass, weights left out."""
    weights = {parameter.data_ptr() for parameter in layer.parameters()}
    stored: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if tensor.data_ptr() not in weights:
            stored[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        held = layer(x)
    del held
    return sum(stored.values())


def crossover(tokens: Sequence[int], hyena: Sequence[float], attention: Sequence[float]) -> float | None:
    """Return from how many tokens on Hyena is faster, between the sizes by powers; None where it is not.

    >>> crossover([256, 1024], [2.0, 8.0], [1.0, 16.0])
    512.0
    """
    ratios = [math.log(theirs / ours) for theirs, ours in zip(attention, hyena, strict=True)]
    for number in range(len(tokens) - 1, -1, -1):
        if ratios[number] <= 0:
            if number == len(tokens) - 1:
                return None
            low, high = (math.log(count) for count in tokens[number : number + 2])
            share = -ratios[number] / (ratios[number + 1] - ratios[number])
            return round(math.exp(low + share * (high - low)), 6)
    return float(tokens[0])


def plot(milliseconds: dict[str, dict[int, float]], where: str) -> None:
    """Write the picture of the time of a step by the number of tokens."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for name, times in milliseconds.items():
        axes.plot(list(times), list(times.values()), marker="o", label=LABELS[name])
    tokens = sorted(milliseconds["hyena"])
    ours, theirs = ([milliseconds[name][count] for count in tokens] for name in ("hyena", "fused"))
    if (from_here := crossover(tokens, ours, theirs)) is not None and from_here > tokens[0]:
        axes.axvline(from_here, color="grey", linestyle=":", label=f"Hyena = SDPA at {from_here:,.0f} tokens")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(tokens, [f"{count:,}" for count in tokens])
    axes.set_xlabel("tokens")
    axes.set_ylabel("step of one layer, ms")
    axes.set_title(where, fontsize=8)
    axes.legend(fontsize=8)
    figure.savefig(PLOT, dpi=100)
    plt.close(figure)


def main() -> None:
    """Time in turn and print or write the tables and the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=96)
    parser.add_argument("--heads", type=int, default=3)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--sides", type=int, nargs="+", default=[16, 32, 64, 128])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="write table and plot to docs/")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    clock = time.perf_counter if device == "cuda" else time.process_time
    rows = []
    milliseconds: dict[str, dict[int, float]] = {name: {} for name in LABELS}
    for side in options.sides:
        torch.manual_seed(0)
        ours = HyenaND(options.dim, (side, side)).to(device)
        fused = Attention(options.dim, options.heads, qkv_bias=True).to(device)
        layers: dict[str, nn.Module] = {"hyena": ours, "published": Published(ours), "fused": fused}
        if side**2 <= MATRIX_LIMIT:
            layers["written"] = WrittenOut(fused)
        x = torch.randn(options.batch, side**2, options.dim, device=device, requires_grad=True)
        with torch.no_grad():
            torch.testing.assert_close(layers["published"](x), ours(x), rtol=1e-3, atol=1e-4)
        calls = {name: (lambda layer=layer, x=x: step(layer, x)) for name, layer in layers.items()}
        seconds = alternate(calls, rounds=options.rounds, warmup=1, clock=clock)
        memory = {name: kept(layer, x) / 2**20 for name, layer in layers.items()}
        best = {name: min(times) * 1e3 for name, times in seconds.items()}
        for name, value in best.items():
            milliseconds[name][side**2] = value
        rows.append(
            [
                f"{side} × {side} = {side**2:,}",
                *(f"{best[name]:.1f}" if name in best else "–" for name in ("hyena", "published", "fused", "written")),
                f"{paired_ratio(seconds['published'], seconds['hyena']):.2f} ×",
                f"{paired_ratio(seconds['fused'], seconds['hyena']):.2f} ×",
                *(f"{memory[name]:.0f}" if name in memory else "–" for name in ("hyena", "fused", "written")),
            ]
        )
    header = [
        *("tokens", "Hyena, ms", "published operator, ms", "SDPA, ms", "softmax written out, ms"),
        *("faster than published", "faster than SDPA", "Hyena keeps, MiB", "SDPA keeps", "written out keeps"),
    ]
    text = (
        f"`python -m benchmarks.hyena_layer --dim {options.dim} --batch {options.batch}`, "
        f"a step of one layer, float32; "
        f"{machine()}.\n\n{markdown_table(header, rows)}"
    )
    print(text)
    if options.write:
        rewrite(PAGE, "hyena_layer", text)
        plot(milliseconds, f"width {options.dim}, batch {options.batch}, float32\n{machine()}")


if __name__ == "__main__":
    main()
