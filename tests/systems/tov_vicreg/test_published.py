"""Published TOV-VICReg checkpoints against a forward pass written out in plain torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import patchloom as pl
from patchloom.errors import UsageError
from patchloom.systems.tov_vicreg.model import PERMUTATIONS

WIDTH, HEADS, DEPTH, HIDDEN = 24, 2, 2, 20


def encoder_layout(patch: int = 8, channels: int = 3, seed: int = 0) -> dict[str, Tensor]:
    """A bare encoder's tensors; positions are those of 224 pixels, whatever the frames are."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return 0.3 * torch.randn(shape, generator=generator)

    state = {
        "cls_token": draw(1, 1, WIDTH),
        "pos_embed": draw(1, (224 // patch) ** 2 + 1, WIDTH),
        "patch_embed.proj.weight": draw(WIDTH, channels, patch, patch) / 3,
        "patch_embed.proj.bias": draw(WIDTH),
        "norm.weight": 1 + draw(WIDTH),
        "norm.bias": draw(WIDTH),
    }
    for number in range(DEPTH):
        for name, shape in {
            "norm1.weight": (WIDTH,),
            "norm1.bias": (WIDTH,),
            "attn.qkv.weight": (3 * WIDTH, WIDTH),
            "attn.qkv.bias": (3 * WIDTH,),
            "attn.proj.weight": (WIDTH, WIDTH),
            "attn.proj.bias": (WIDTH,),
            "norm2.weight": (WIDTH,),
            "norm2.bias": (WIDTH,),
            "mlp.fc1.weight": (4 * WIDTH, WIDTH),
            "mlp.fc1.bias": (4 * WIDTH,),
            "mlp.fc2.weight": (WIDTH, 4 * WIDTH),
            "mlp.fc2.bias": (WIDTH,),
        }.items():
            state[f"blocks.{number}.{name}"] = draw(*shape)
    return state


def module_layout() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    state = {f"backbone.{name}": value for name, value in encoder_layout().items()}
    for layer, (after, before) in {0: (HIDDEN, WIDTH), 3: (HIDDEN, HIDDEN), 6: (HIDDEN, HIDDEN)}.items():
        state[f"projector.{layer}.weight"] = 0.3 * torch.randn(after, before, generator=generator)
    for layer in (0, 3):
        state[f"projector.{layer}.bias"] = torch.randn(HIDDEN, generator=generator)
        state[f"projector.{layer + 1}.weight"] = 1 + 0.3 * torch.randn(HIDDEN, generator=generator)
        state[f"projector.{layer + 1}.bias"] = torch.randn(HIDDEN, generator=generator)
        state[f"projector.{layer + 1}.running_mean"] = torch.randn(HIDDEN, generator=generator)
        state[f"projector.{layer + 1}.running_var"] = 0.5 + torch.rand(HIDDEN, generator=generator)
        state[f"projector.{layer + 1}.num_batches_tracked"] = torch.tensor(7)
    state["temporal_order_predictor.0.weight"] = torch.randn(1, 3 * WIDTH, generator=generator)
    state["temporal_order_predictor.0.bias"] = torch.randn(1, generator=generator)
    return state


def published_encoder(s: dict[str, Tensor], images: Tensor) -> Tensor:
    """DINO's forward pass: positions are interpolated to the grid at run time, with the offset of 0.1."""
    patch = s["patch_embed.proj.weight"].shape[-1]
    maps = F.conv2d(images, s["patch_embed.proj.weight"], s["patch_embed.proj.bias"], stride=patch)
    x = torch.cat([s["cls_token"].expand(len(images), -1, -1), maps.flatten(2).transpose(1, 2)], 1)
    positions = s["pos_embed"]
    if not (positions.shape == x[:1].shape and images.shape[2] == images.shape[3]):
        side = int((positions.shape[1] - 1) ** 0.5)
        h, w = images.shape[2] // patch + 0.1, images.shape[3] // patch + 0.1
        table = positions[:, 1:].reshape(1, side, side, WIDTH).permute(0, 3, 1, 2)
        table = F.interpolate(table, scale_factor=(h / side, w / side), mode="bicubic")
        assert table.shape[-2:] == (int(h), int(w))
        positions = torch.cat([positions[:, :1], table.permute(0, 2, 3, 1).reshape(1, -1, WIDTH)], 1)
    x = x + positions
    for n in range(DEPTH):
        b = {name.removeprefix(f"blocks.{n}."): value for name, value in s.items() if name.startswith(f"blocks.{n}.")}
        y = F.layer_norm(x, (WIDTH,), b["norm1.weight"], b["norm1.bias"], 1e-6)
        qkv = (y @ b["attn.qkv.weight"].T + b["attn.qkv.bias"]).reshape(*y.shape[:2], 3, HEADS, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attention = ((q @ k.transpose(-2, -1)) * (WIDTH // HEADS) ** -0.5).softmax(-1)
        y = (attention @ v).transpose(1, 2).flatten(2)
        x = x + y @ b["attn.proj.weight"].T + b["attn.proj.bias"]
        y = F.layer_norm(x, (WIDTH,), b["norm2.weight"], b["norm2.bias"], 1e-6)
        y = F.gelu(y @ b["mlp.fc1.weight"].T + b["mlp.fc1.bias"])
        x = x + y @ b["mlp.fc2.weight"].T + b["mlp.fc2.bias"]
    return F.layer_norm(x, (WIDTH,), s["norm.weight"], s["norm.bias"], 1e-6)[:, 0]


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("patch", [8, 12, 16])
def test_the_class_token_of_frames_of_84(patch):
    state = encoder_layout(patch, channels=4) if patch == 12 else encoder_layout(patch)
    state["pos_embed"] = state["pos_embed"] if patch != 12 else state["pos_embed"][:, : 18 * 18 + 1]
    model = pl.load_reference("tov_vicreg", state, num_heads=HEADS)
    images = torch.rand(3, state["patch_embed.proj.weight"].shape[1], 84, 84)
    close(model(images), published_encoder(state, images))
    assert not model.training


@pytest.mark.parametrize("size", [224, 96, (64, 128)])
def test_other_sizes_are_told(size):
    state = encoder_layout()
    model = pl.load_reference("tov_vicreg", state, num_heads=HEADS, image_size=size)
    images = torch.rand(2, 3, *((size, size) if isinstance(size, int) else size))
    close(model(images), published_encoder(state, images))


def test_the_full_training_module_in_eval_and_training_mode():
    state = module_layout()
    model = pl.load_reference("tov_vicreg", {"state_dict": {f"module.{k}": v for k, v in state.items()}}, num_heads=2)
    views = torch.rand(4, 6, 3, 84, 84)
    labels = torch.tensor([3, 0, 1, 5, 2, 4])
    own = {name.removeprefix("backbone."): value for name, value in state.items() if name.startswith("backbone.")}
    h = [published_encoder(own, view) for view in views]
    s = {name.removeprefix("projector."): value.clone() for name, value in state.items() if "projector" in name}

    def project(x: Tensor, training: bool) -> Tensor:
        for layer in ("0", "3"):
            norm = str(int(layer) + 1)
            x = F.linear(x, s[f"{layer}.weight"], s[f"{layer}.bias"])
            mean, var = s[f"{norm}.running_mean"], s[f"{norm}.running_var"]
            x = F.relu(F.batch_norm(x, mean, var, s[f"{norm}.weight"], s[f"{norm}.bias"], training, 0.1, 1e-5))
        return x @ s["6.weight"].T

    joined = torch.stack([h[0], h[2], h[3]], 1)
    orders = torch.tensor(PERMUTATIONS)[labels]
    rows = torch.stack([joined[i, orders[i]].flatten() for i in range(6)])
    logits = rows @ state["temporal_order_predictor.0.weight"].T + state["temporal_order_predictor.0.bias"]
    order_loss = F.binary_cross_entropy_with_logits(logits[:, 0], (labels != 0).float())
    for training in (False, True):
        z = [project(part, training) for part in h]
        model.train(training)
        losses = model(*views, labels=labels)
        variance = sum(F.relu(1 - (z[i].var(0) + 1e-4).sqrt()).mean() / 2 for i in (0, 1))
        crossed = [torch.cov(z[i].T) for i in (0, 1)]
        covariance = sum(c.square().sum() - c.diagonal().square().sum() for c in crossed) / HIDDEN
        close(losses["invariance"], F.mse_loss(z[0], z[1]))
        close(losses["variance"], variance)
        torch.testing.assert_close(losses["covariance"], covariance, atol=1e-5, rtol=1e-4)
        close(losses["temporal"], order_loss)
        whole = 10 * F.mse_loss(z[0], z[1]) + 0.1 * order_loss + 10 * variance + 10 * covariance
        torch.testing.assert_close(losses["loss"], whole, atol=1e-4, rtol=1e-4)
    for name in ("1.running_mean", "1.running_var", "4.running_mean", "4.running_var"):
        close(model.state_dict()[f"projector.{name}"], s[name])


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: {"teacher": {**{f"module.backbone.{k}": v for k, v in s.items()}, "module.head.w": torch.ones(1)}},
        lambda s: {
            "state_dict": {
                **{f"module.base_encoder.{k}": v for k, v in s.items()},
                "module.base_encoder.head.0.weight": torch.ones(1),
                "module.momentum_encoder.cls_token": torch.ones(1),
                "module.predictor.0.weight": torch.ones(1),
            }
        },
        lambda s: {f"vit.{k}": v for k, v in s.items()},
        lambda s: {f"encoder.{k}": v for k, v in s.items()} | {"head.weight": torch.ones(1)},
    ],
)
def test_other_methods_checkpoints_are_taken_as_the_published_loader_does(wrap):
    state = encoder_layout()
    images = torch.rand(2, 3, 84, 84)
    close(pl.load_reference("tov_vicreg", wrap(state), num_heads=HEADS)(images), published_encoder(state, images))


def test_weights_of_the_loss_are_settings_and_wrong_ones_are_refused():
    state = module_layout()
    model = pl.load_reference("tov_vicreg", state, num_heads=HEADS, sim=25, std_coeff=25, cov=1, temporal=1)
    assert (model.sim, model.std, model.cov, model.temporal) == (25, 25, 1, 1)
    with pytest.raises(UsageError, match="did you mean num_heads"):
        pl.load_reference("tov_vicreg", state, num_head=2)
    with pytest.raises(UsageError, match="tensors say 20-20-20"):
        pl.load_reference("tov_vicreg", state, num_heads=2, mlp="8-8")
    with pytest.raises(UsageError, match="patch_size=16, but the checkpoint's tensors say 8"):
        pl.load_reference("tov_vicreg", state, num_heads=2, patch_size=16)
    assert pl.load_reference("tov_vicreg", encoder_layout(), num_heads=2, img_size=[224], embed_dim=WIDTH)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("backbone.blocks.1.norm1.bias"), r"missing: backbone.blocks.1.norm1.bias"),
        (lambda s: s.update({"backbone.surprise": torch.zeros(1)}), "unexpected: backbone.surprise"),
        (lambda s: s.update({"temporal_order_predictor.0.bias": torch.zeros(2)}), r"\(2,\) instead of \(1,\)"),
        (lambda s: s.pop("backbone.pos_embed"), "has no pos_embed"),
        (lambda s: s.pop("projector.6.weight"), "missing: projector.6.weight"),
        (lambda s: s.update({"projector.junk": torch.zeros(2, 2)}), "unexpected: projector.junk"),
        (lambda s: s.pop("temporal_order_predictor.0.bias"), "missing: temporal_order_predictor.0.bias"),
        (lambda s: s.update({"backbone.pos_embed": torch.zeros(1, 8, WIDTH)}), "no square"),
    ],
)
def test_tensors_missing_left_over_or_misshapen_are_named(change, message):
    state = module_layout()
    change(state)
    with pytest.raises(UsageError, match=message):
        pl.load_reference("tov_vicreg", state, num_heads=HEADS)
