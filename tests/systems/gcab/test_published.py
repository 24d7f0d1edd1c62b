"""The published layout gives the published outputs, written out here from its tensors alone, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import patchloom as pl
from patchloom.errors import UsageError

D, HEADS, BLOCKS, SIDE, PATCH, TASKS, CLASSES = 24, 6, 2, 12, 4, 5, (2, 3, 1)
N, HIDDEN = (SIDE // PATCH) ** 2, 4 * D


def published(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float = 0.3) -> Tensor:
        return torch.randn(*shape, generator=generator) * scale

    def norm(name: str, *shape: int) -> dict[str, Tensor]:
        return {f"{name}.weight": 1 + draw(*shape), f"{name}.bias": draw(*shape)}

    def mlp(name: str) -> dict[str, Tensor]:
        shapes = {"fc1.weight": (HIDDEN, D), "fc1.bias": (HIDDEN,), "fc2.weight": (D, HIDDEN), "fc2.bias": (D,)}
        return {f"{name}.mlp.{part}": draw(*shape) for part, shape in shapes.items()}

    state = {"patch_embed.proj.weight": draw(D, 3, PATCH, PATCH), "patch_embed.proj.bias": draw(D)}
    state["pos_embed"] = draw(1, N, D)
    for number in range(BLOCKS):
        place = f"sabs.{number}"
        state |= {**norm(f"{place}.norm1", D), **norm(f"{place}.norm2", D), **mlp(place)}
        state |= {f"{place}.attn.qk.weight": draw(2 * D, D), f"{place}.attn.v.weight": draw(D, D)}
        state |= {f"{place}.attn.proj.weight": draw(D, D), f"{place}.attn.proj.bias": draw(D)}
        state |= {f"{place}.attn.pos_proj.weight": draw(HEADS, 3), f"{place}.attn.pos_proj.bias": draw(HEADS)}
        state[f"{place}.attn.gating_param"] = draw(HEADS, scale=1.0)
    state |= {**norm("tabs.0.norm1", D), **norm("tabs.0.norm2", D), **mlp("tabs.0")}
    state |= {f"tabs.0.attn.{name}.weight": draw(D, D) for name in ("q", "k", "v", "proj")}
    state["tabs.0.attn.proj.bias"] = draw(D)
    for task, count in enumerate(CLASSES):
        state[f"class_tokens.{task}"] = draw(1, 1, D)
        state |= norm(f"head.{task}.norm", D)
        state |= {f"head.{task}.head.weight": draw(count, D), f"head.{task}.head.bias": draw(count)}
    state["task_tokens.0"] = state["class_tokens.0"]
    state |= {"embs_0.weight": draw(TASKS, D, scale=1.0), "embs_2.weight": draw(TASKS, HIDDEN, scale=1.0)}
    state["embs_0.weight"][0, :3] = 0.0  # closed: a gate opens above 0
    state["embs_0.weight"][2, :4] = torch.tensor([1e-3, -1e-3, 5e-4, -2e-3])  # the newest task's are not quite binary
    for task in range(len(CLASSES) - 1):
        place = f"projectors.{task}"
        state |= {f"{place}.0.weight": draw(D, D, 1, 1), f"{place}.0.bias": draw(D), **norm(f"{place}.1", D, 1, N)}
        state |= {f"{place}.3.weight": draw(D, D, 1, 1), f"{place}.3.bias": draw(D)}
    return state


def normed(x: Tensor, weight: Tensor, bias: Tensor, axes: tuple[int, ...] = (-1,)) -> Tensor:
    mean = x.mean(axes, keepdim=True)
    return (x - mean) / ((x - mean).square().mean(axes, keepdim=True) + 1e-5).sqrt() * weight + bias


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def reference(state: dict[str, Tensor], images: Tensor) -> Tensor:
    """The published model after its third task."""
    s = {name: value.double() for name, value in state.items()}
    images, side = images.double(), SIDE // PATCH
    tiles = images.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH)  # (B, 3, side, side, p, p)
    x = torch.einsum("bcijpq,dcpq->bijd", tiles, s["patch_embed.proj.weight"]).flatten(1, 2)
    x = x + s["patch_embed.proj.bias"] + s["pos_embed"]
    rel = torch.zeros(N, N, 3, dtype=torch.float64)
    for i in range(N):
        for j in range(N):
            dx, dy = j % side - i % side, j // side - i // side
            rel[i, j] = torch.tensor([dx, dy, dx * dx + dy * dy], dtype=torch.float64)
    each = D // HEADS
    for number in range(BLOCKS):
        p = f"sabs.{number}."
        z = normed(x, s[p + "norm1.weight"], s[p + "norm1.bias"])
        qk = z @ s[p + "attn.qk.weight"].T
        position = rel @ s[p + "attn.pos_proj.weight"].T + s[p + "attn.pos_proj.bias"]
        out = []
        for head in range(HEADS):
            columns = slice(head * each, (head + 1) * each)
            q, k = qk[..., :D][..., columns], qk[..., D:][..., columns]
            content = (q @ k.transpose(1, 2) / math.sqrt(each)).softmax(-1)
            gate = torch.sigmoid(s[p + "attn.gating_param"][head])
            attention = (1 - gate) * content + gate * position[..., head].softmax(-1)
            attention = attention / attention.sum(-1, keepdim=True)
            out.append(attention @ (z @ s[p + "attn.v.weight"].T)[..., columns])
        x = x + torch.cat(out, -1) @ s[p + "attn.proj.weight"].T + s[p + "attn.proj.bias"]
        z = normed(x, s[p + "norm2.weight"], s[p + "norm2.bias"])
        z = gelu(z @ s[p + "mlp.fc1.weight"].T + s[p + "mlp.fc1.bias"])
        x = x + z @ s[p + "mlp.fc2.weight"].T + s[p + "mlp.fc2.bias"]
    logits = []
    newest = len(CLASSES) - 1
    for task in range(len(CLASSES)):
        seen = x
        for j in range(newest - 1, task - 1, -1):
            p = f"projectors.{j}."
            z = seen @ s[p + "0.weight"][:, :, 0, 0].T + s[p + "0.bias"]
            weight, bias = (s[p + "1." + name][:, 0].T for name in ("weight", "bias"))
            z = normed(z, weight, bias, (-2, -1)).clamp_min(0)
            seen = z @ s[p + "3.weight"][:, :, 0, 0].T + s[p + "3.bias"]
        e0, e2 = s["embs_0.weight"][task], s["embs_2.weight"][task]
        if task == newest:
            m0, m2 = torch.sigmoid(800 * e0), torch.sigmoid(800 * e2)
        else:
            m0, m2 = (e0 > 0).double(), (e2 > 0).double()
        token = s[f"class_tokens.{task}"].expand(len(images), -1, -1)
        z = normed(torch.cat([token, seen], 1), s["tabs.0.norm1.weight"], s["tabs.0.norm1.bias"])
        q = ((z[:, 0] * m0) @ s["tabs.0.attn.q.weight"].T) * m0
        k = ((z * m0) @ s["tabs.0.attn.k.weight"].T) * m0
        v = (z * m0) @ s["tabs.0.attn.v.weight"].T
        out = []
        for head in range(HEADS):
            c = slice(head * each, (head + 1) * each)
            scores = torch.einsum("bd,bnd->bn", q[:, c], k[..., c]) / math.sqrt(each)
            out.append(torch.einsum("bn,bnd->bd", scores.softmax(-1), v[..., c]))
        o = torch.cat(out, -1) * m0
        o = (o @ s["tabs.0.attn.proj.weight"].T + s["tabs.0.attn.proj.bias"]) * m0
        u = token[:, 0] + o
        z = normed(u, s["tabs.0.norm2.weight"], s["tabs.0.norm2.bias"]) * m0
        z = gelu(z @ s["tabs.0.mlp.fc1.weight"].T + s["tabs.0.mlp.fc1.bias"]) * m2
        y = u + (z @ s["tabs.0.mlp.fc2.weight"].T + s["tabs.0.mlp.fc2.bias"]) * m0
        z = normed(y, s[f"head.{task}.norm.weight"], s[f"head.{task}.norm.bias"])
        logits.append(z @ s[f"head.{task}.head.weight"].T + s[f"head.{task}.head.bias"])
    return torch.cat(logits, 1)


def test_the_published_state_after_three_tasks_gives_the_published_logits():
    state, images = published(), torch.randn(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    model = pl.load_reference("gcab", {"model": state, "task_id": 2}, num_heads=HEADS)
    assert not model.training
    assert model.class_counts == list(CLASSES)
    with torch.no_grad():
        torch.testing.assert_close(model(images).double(), reference(state, images), rtol=0, atol=2e-5)
        exact = model.double()(images.double())
    torch.testing.assert_close(exact, reference(state, images), rtol=0, atol=1e-10)


def test_one_task_has_no_projector_and_soft_gates():
    state = {
        name: value
        for name, value in published().items()
        if not name.startswith(("projectors.", "head.1", "head.2", "class_tokens.1", "class_tokens.2"))
    }
    model = pl.load_reference("gcab", state)
    assert model(torch.zeros(2, 3, SIDE, SIDE)).shape == (2, CLASSES[0])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state.pop("projectors.1.0.weight"), "missing: projectors.1.0.weight"),
        (lambda state: state.pop("head.1.norm.bias"), "missing: head.1.norm.bias"),
        (lambda state: state.update({"extra": torch.zeros(1)}), "unexpected: extra"),
        (lambda state: state.pop("embs_2.weight"), "missing: embs_2.weight"),
        (
            lambda state: [state.pop(name) for name in list(state) if name.startswith("projectors.1")],
            "1 projectors for 3 tasks",
        ),
    ],
)
def test_a_state_that_does_not_fit_is_refused_by_its_own_names(change, words):
    state = published()
    change(state)
    with pytest.raises(UsageError, match=words):
        pl.load_reference("gcab", state)


def test_settings_that_contradict_the_tensors_are_refused():
    for name, value in {"num_heads": 12, "embed_dim": 48, "patch_size": 8, "input_size": 64, "nhead": 2}.items():
        with pytest.raises(UsageError, match=name.replace("input_size", "img_size|input_size")):
            pl.load_reference("gcab", published(), **{name: value})
    whole = {"num_heads": HEADS, "embed_dim": D, "depth": BLOCKS + 1, "patch_size": PATCH, "input_size": SIDE}
    assert pl.load_reference("gcab", published(), **whole, lr=5e-4, batch_size=128, mlp_ratio=4)
