"""CentroidMIM against its formulas, written out in float64, every parameter randomised."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from patchloom.encoders import create_encoder
from patchloom.errors import UsageError
from patchloom.systems.ccvit.model import CentroidMIM, CentroidMIMLoss, MIMOutput, initialize_as_beit, pixel_targets

PATCH, GRID, WIDTH, HEADS, DEPTH, EARLY, VOCAB = 4, (3, 4), 24, 3, 4, 2, 17


def randomised(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return module.double().eval()


def model(**settings: object) -> CentroidMIM:
    backbone = create_encoder(
        "ccvit_tiny_patch4_32",
        image_size=(GRID[0] * PATCH, GRID[1] * PATCH),
        embed_dim=WIDTH,
        depth=DEPTH,
        num_heads=HEADS,
    )
    made = CentroidMIM(backbone, VOCAB, **{"early_layers": EARLY, "head_layers": 2, **settings})
    return randomised(made)  # type: ignore[return-value]


def relative_bias(table: Tensor) -> Tensor:
    """(heads, 1 + N, 1 + N) from the table's definition, entry by entry."""
    h, w = GRID
    cells = [(row, column) for row in range(h) for column in range(w)]
    index = torch.zeros(1 + h * w, 1 + h * w, dtype=torch.long)
    for i, (row_i, column_i) in enumerate(cells):
        for j, (row_j, column_j) in enumerate(cells):
            index[1 + i, 1 + j] = (row_i - row_j + h - 1) * (2 * w - 1) + (column_i - column_j + w - 1)
    index[0, :] = len(table) - 3
    index[:, 0] = len(table) - 2
    index[0, 0] = len(table) - 1
    return table[index].permute(2, 0, 1)


def norm(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, correction=0)
    return (x - mean) / torch.sqrt(var + 1e-6) * state[f"{name}.weight"] + state[f"{name}.bias"]


def block(x: Tensor, state: dict[str, Tensor], name: str, bias: Tensor) -> Tensor:
    batch, count, width = x.shape
    head = width // HEADS
    normed = norm(x, state, f"{name}.norm1")
    q, k, v = (normed @ part.T for part in state[f"{name}.attn.qkv.weight"].chunk(3))
    q, v = q + state[f"{name}.attn.q_bias"], v + state[f"{name}.attn.v_bias"]
    q, k, v = (t.view(batch, count, HEADS, head).transpose(1, 2) for t in (q, k, v))
    weights = ((q * head**-0.5) @ k.transpose(-1, -2) + bias).softmax(-1)
    mixed = (weights @ v).transpose(1, 2).reshape(batch, count, width)
    mixed = mixed @ state[f"{name}.attn.proj.weight"].T + state[f"{name}.attn.proj.bias"]
    x = x + state[f"{name}.gamma_1"] * mixed
    hidden = norm(x, state, f"{name}.norm2") @ state[f"{name}.mlp.fc1.weight"].T + state[f"{name}.mlp.fc1.bias"]
    hidden = 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))
    return x + state[f"{name}.gamma_2"] * (hidden @ state[f"{name}.mlp.fc2.weight"].T + state[f"{name}.mlp.fc2.bias"])


def formula(state: dict[str, Tensor], images: Tensor, masked: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    batch = len(images)
    kernel = state["encoder.patch_embed.proj.weight"].flatten(1)
    cells = images.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH)  # (B, C, h, w, row, column)
    vectors = cells.permute(0, 2, 3, 1, 4, 5).reshape(batch, GRID[0] * GRID[1], -1)
    x = vectors @ kernel.T + state["encoder.patch_embed.proj.bias"]
    x = torch.where(masked[..., None], state["mask_token"].expand_as(x), x)
    x = torch.cat([state["encoder.cls_token"].expand(batch, -1, -1), x], dim=1)
    bias = relative_bias(state["encoder.rel_pos_bias.relative_position_bias_table"])
    early = x
    for number in range(DEPTH):
        x = block(x, state, f"encoder.blocks.{number}", bias)
        if number + 1 == EARLY:
            early = x
    joined = torch.cat([x[:, :1], early[:, 1:]], dim=1)
    for number in range(2):
        joined = block(joined, state, f"condenser.{number}", bias)
    logits = norm(x[:, 1:][targets], state, "encoder.norm") @ state["token_head.weight"].T + state["token_head.bias"]
    pixels = norm(joined[:, 1:][targets], state, "condenser_norm")
    return logits, pixels @ state["condenser_head.weight"].T + state["condenser_head.bias"]


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    count = GRID[0] * GRID[1]
    images = torch.randn(3, 3, GRID[0] * PATCH, GRID[1] * PATCH, generator=generator, dtype=torch.float64)
    draw = torch.rand(3, count, generator=generator)
    return images, draw < 0.4, draw < 0.6


def test_equals_the_formula_in_float64(inputs):
    images, masked, targets = inputs
    ours = model()
    logits, pixels = formula(dict(ours.state_dict()), images, masked, targets)
    output = ours(images, masked, targets)
    torch.testing.assert_close(output.token_logits, logits, atol=1e-10, rtol=0)
    torch.testing.assert_close(output.pixels, pixels, atol=1e-10, rtol=0)
    assert output.condenser_logits is None


def test_rows_are_batch_major_then_row_major(inputs):
    images, masked, targets = inputs
    ours = model()
    everything = ours(images, masked, return_all_tokens=True)
    some = ours(images, masked, targets)
    rows = targets.flatten()
    assert torch.equal(everything.token_logits.shape == (rows.numel(), VOCAB) and rows, rows)
    torch.testing.assert_close(everything.token_logits[rows], some.token_logits)
    torch.testing.assert_close(everything.pixels[rows], some.pixels)


def test_masks_may_be_grids_and_targets_default_to_the_masked(inputs):
    images, masked, _ = inputs
    ours = model()
    flat, grid = ours(images, masked), ours(images, masked.view(-1, *GRID))
    torch.testing.assert_close(flat.token_logits, grid.token_logits)
    assert len(flat.token_logits) == int(masked.sum())


def test_what_is_hidden_is_not_seen(inputs):
    images, masked, targets = inputs
    ours = model()
    hidden = masked.view(-1, *GRID).repeat_interleave(PATCH, 1).repeat_interleave(PATCH, 2).unsqueeze(1)
    changed = torch.where(hidden, torch.randn_like(images), images)
    torch.testing.assert_close(ours(changed, masked, targets).pixels, ours(images, masked, targets).pixels)
    assert not torch.allclose(ours(changed, ~masked, targets).pixels, ours(images, ~masked, targets).pixels)


def test_pixels_reach_every_block_only_through_the_class_token(inputs):
    images, masked, targets = inputs
    ours = model()
    ours(images, masked, targets).pixels.square().sum().backward()
    late = ours.encoder.blocks[DEPTH - 1].mlp.fc2.weight.grad
    assert late is not None
    assert late.abs().sum() > 0  # through the class token
    assert ours.token_head.weight.grad is None


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"shared_head": True}, (None, VOCAB)),
        ({"condenser_head": "tokens"}, (None, VOCAB)),
        ({"head_layers": 0}, (None, None)),
        ({}, (3 * PATCH**2, None)),
    ],
)
def test_the_condenser_predicts_what_its_head_is_for(settings, expected, inputs):
    images, masked, _ = inputs
    output = model(**settings)(images, masked)
    widths = tuple(None if part is None else part.shape[1] for part in (output.pixels, output.condenser_logits))
    assert widths == expected


@pytest.mark.parametrize("early_layers", [0, 5, -1])
def test_early_layers_outside_the_encoder_are_refused(early_layers):
    with pytest.raises(UsageError, match=f"early_layers is {early_layers}; it must be 1 to 4"):
        model(early_layers=early_layers)


def test_an_encoder_without_class_token_is_refused():
    encoder = create_encoder("vit_tiny_patch16_224", depth=2, class_token=False, global_pool="avg")
    with pytest.raises(UsageError, match="class token"):
        CentroidMIM(encoder, 8)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224", "deit3_small_patch16_224"])
def test_other_encoders_of_the_contract_train_too(name):
    encoder = create_encoder(name, depth=3, **({} if "eva" in name else {"embed_dim": 96, "num_heads": 3}))
    ours = CentroidMIM(encoder, 8, head_layers=1)
    masked = torch.zeros(1, (224 // encoder.patch_embed.patch_size[0]) ** 2, dtype=torch.bool)
    masked[:, :20] = True
    output = ours(torch.randn(1, 3, 224, 224), masked)
    (output.token_logits.square().mean() + output.pixels.square().mean()).backward()
    without = [n for n, p in ours.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []


def test_losses_equal_their_formulas():
    generator = torch.Generator().manual_seed(0)
    logits, condenser = torch.randn(2, 7, VOCAB, generator=generator, dtype=torch.float64)
    pixels, targets = torch.randn(2, 7, 48, generator=generator, dtype=torch.float64)
    ids = torch.randint(VOCAB, (7,), generator=generator)
    token = -(logits.log_softmax(-1)[torch.arange(7), ids]).mean()
    second = -(condenser.log_softmax(-1)[torch.arange(7), ids]).mean()
    pixel = ((pixels - targets) ** 2).mean()
    dual = CentroidMIMLoss(2.0, 0.5)(MIMOutput(logits, pixels), ids, targets)
    torch.testing.assert_close(dual["loss"], 2 * token + 0.5 * pixel)
    torch.testing.assert_close(dual["token_loss"], token)
    torch.testing.assert_close(dual["pixel_loss"], pixel)
    both = CentroidMIMLoss(mode="token")(MIMOutput(logits, None, condenser), ids, targets)
    torch.testing.assert_close(both["loss"], token + second)
    alone = CentroidMIMLoss(mode="pixel")(MIMOutput(logits, pixels), ids, targets)
    torch.testing.assert_close(alone["loss"], pixel)
    codes = torch.rand(VOCAB, 48, generator=generator, dtype=torch.float64)
    soft = CentroidMIMLoss(mode="soft_centroid")(MIMOutput(logits, None, condenser), ids, targets, codes)
    expected = sum((((x.softmax(-1) @ codes) - targets) ** 2).mean() for x in (logits, condenser))
    torch.testing.assert_close(soft["loss"], expected)


def test_a_pixel_loss_without_pixel_head_is_refused():
    with pytest.raises(UsageError, match="needs a pixel head"):
        CentroidMIMLoss()(MIMOutput(torch.zeros(2, 3), None), torch.zeros(2, dtype=torch.long), torch.zeros(2, 4))


def test_pixel_targets_are_channel_row_column_with_unbiased_variance():
    images = torch.rand(2, 3, 8, 12, generator=torch.Generator().manual_seed(0))
    patch = images[1, :, 4:8, 8:12].double().flatten()
    expected = (patch - patch.mean()) / torch.sqrt(patch.var(correction=1) + 1e-6)
    torch.testing.assert_close(pixel_targets(images, 4)[1, 5].double(), expected, atol=1e-5, rtol=0)


def test_initialisation_is_the_published_one():
    torch.manual_seed(0)
    encoder = create_encoder("ccvit_tiny_patch4_32", depth=4)
    initialize_as_beit(encoder)
    weight = encoder.blocks[2].attn.qkv.weight
    assert weight.abs().max() <= 0.02
    # A normal cut at ±σ has the standard deviation 0.5396 σ.
    assert weight.std().item() == pytest.approx(0.02 * 0.5396, rel=0.02)
    assert encoder.blocks[2].mlp.fc2.weight.abs().max().item() == pytest.approx(0.02 / math.sqrt(6), rel=0.02)
    assert encoder.cls_token.abs().max() <= 0.02
    ours = CentroidMIM(encoder, 32, early_layers=3, head_layers=2)
    bound = 1 / math.sqrt(192)  # PyTorch's default for a linear layer of 192 inputs
    assert ours.condenser[1].attn.qkv.weight.abs().max().item() == pytest.approx(bound, rel=0.02)
    assert ours.condenser[1].attn.proj.weight.abs().max().item() == pytest.approx(bound / math.sqrt(10), rel=0.02)
    assert ours.token_head.weight.abs().max() <= 0.02
    assert F.mse_loss(encoder.rel_pos_bias.relative_position_bias_table, torch.zeros(228, 3)) == 0
