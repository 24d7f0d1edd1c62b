"""One Hyena layer against attention, by number of tokens, and against the published operator's arithmetic.

    python -m benchmarks.hyena_layer [--dim 96] [--sides 16 32 64 128] [--batch 1] [--rounds 3] [--write]

A step is forward and backward. Attention is timed fused (SDPA) and with its matrix written out; the published operator
transforms twice padded planes whole, and once more for nothing. Memory is what a step keeps for its backward pass.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

from benchmarks.harness import alternate, machine, markdown_table, paired_ratio, rewrite
from patchloom.encoders.hyena import HyenaND

PAGE = Path(__file__).parents[1] / "docs" / "systems" / "hyena_nd.md"
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


def main() -> None:
    """Time in turn and print or write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=96)
    parser.add_argument("--heads", type=int, default=3)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--sides", type=int, nargs="+", default=[16, 32, 64, 128])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="write the tables to docs/systems/hyena_nd.md")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    clock = time.perf_counter if device == "cuda" else time.process_time
    rows = []
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


if __name__ == "__main__":
    main()
