"""The DINOv2 module against its formulas written out in float64."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from patchloom.encoders import create_encoder
from patchloom.errors import UsageError
from patchloom.systems.dinov2.model import DINOHead, DINOv2, doubt, mean_entropy

SMALL = {"image_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8}


def randomised(module: nn.Module, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in [*module.parameters(), *module.buffers()]:
            if value.is_floating_point():
                value.copy_(torch.randn(value.shape, generator=generator) * 0.2)
    return module


def model(seed: int = 0, encoder: str = "vit_tiny_patch16_224", **settings: Any) -> DINOv2:
    made = DINOv2(
        create_encoder(encoder, **SMALL), **{"out_dim": 24, "hidden_dim": 16, "bottleneck_dim": 8, **settings}
    )
    return randomised(made, seed).double()


def crops(batch: int = 3, local: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    globals_ = torch.randn(2 * batch, 3, 32, 32, generator=generator, dtype=torch.float64)
    locals_ = torch.randn(local * batch, 3, 16, 16, generator=generator, dtype=torch.float64)
    masks = torch.zeros(2 * batch, 16, dtype=torch.bool)
    masks[0, :5], masks[2, 3:9], masks[4, 7] = True, True, True
    return globals_, locals_, masks


def head_by_hand(head: DINOHead, x: np.ndarray) -> np.ndarray:
    state = {name: value.detach().numpy() for name, value in head.state_dict().items()}
    for layer in (0, 2, 4):
        x = x @ state[f"mlp.{layer}.weight"].T + state[f"mlp.{layer}.bias"]
        if layer < 4:
            x = torch.nn.functional.gelu(torch.from_numpy(x)).numpy()
    x = x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
    g, v = state["last_layer.parametrizations.weight.original0"], state["last_layer.parametrizations.weight.original1"]
    return x @ (g * v / np.linalg.norm(v, axis=1, keepdims=True)).T


def log_softmax(x: np.ndarray) -> np.ndarray:
    shifted = x - x.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def koleo(x: np.ndarray) -> float:
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    similarity = unit @ unit.T
    np.fill_diagonal(similarity, -1)
    return float(-np.log(np.linalg.norm(unit - unit[similarity.argmax(1)] + 1e-8, axis=1) + 1e-8).mean())


def features(encoder: Any, images: Tensor, masks: Tensor | None, mask_token: Tensor) -> np.ndarray:
    """The encoder's normed tokens by plain calls of its parts; positions as for its own size, or resampled."""
    x = encoder.patch_embed.proj(images).flatten(2).transpose(1, 2)
    if masks is not None:
        x = torch.where(masks[..., None], mask_token, x)
    positions = encoder.pos_embed
    if x.shape[1] != positions.shape[1] - 1:
        side = int(x.shape[1] ** 0.5)
        maps = positions[:, 1:].float().reshape(1, 4, 4, -1).permute(0, 3, 1, 2)
        maps = torch.nn.functional.interpolate(maps, size=(side, side), mode="bicubic", antialias=True)
        positions = torch.cat([positions[:, :1], maps.flatten(2).transpose(1, 2).double()], dim=1)
    x = torch.cat([encoder.cls_token.expand(len(x), -1, -1), x], dim=1) + positions
    for block in encoder.blocks:
        x = block(x)
    return encoder.norm(x).detach().numpy()


@pytest.mark.parametrize("centering", ["centering", "sinkhorn_knopp"])
@pytest.mark.parametrize("separate", [False, True])
def test_the_losses_are_those_of_the_formulas(centering, separate):
    made = model(centering=centering, separate_head=separate, dino_weight=0.7, ibot_weight=1.3, koleo_weight=0.2)
    made.eval()
    globals_, locals_, masks = crops()
    batch, tau = 3, 0.05
    student, teacher = made.student, made.teacher
    teacher_tokens = features(teacher.encoder, globals_, None, teacher.mask_token)
    student_tokens = features(student.encoder, globals_, masks, student.mask_token)
    local_tokens = features(student.encoder, locals_, None, student.mask_token)
    patch_heads = (student.ibot_head, teacher.ibot_head) if separate else (student.dino_head, teacher.dino_head)
    swapped = np.concatenate([teacher_tokens[batch:, 0], teacher_tokens[:batch, 0]])
    hidden = masks.numpy()
    class_logits = head_by_hand(teacher.dino_head, swapped)
    patch_logits = head_by_hand(patch_heads[1], teacher_tokens[:, 1:][hidden])
    if centering == "centering":
        t = np.exp(log_softmax((class_logits - made.dino_centering.center.numpy()) / tau))
        t_patch = np.exp(log_softmax((patch_logits - made.ibot_centering.center.numpy()) / tau))
    else:
        t, t_patch = sinkhorn(class_logits, tau), sinkhorn(patch_logits, tau)
    s = head_by_hand(student.dino_head, student_tokens[:, 0])
    s_local = head_by_hand(student.dino_head, local_tokens[:, 0])
    s_patch = head_by_hand(patch_heads[0], student_tokens[:, 1:][hidden])
    terms = 2 + 2 * 4
    global_loss = -(t * log_softmax(s / 0.1)).sum(-1).mean() * 2 / terms
    local_loss = 0.0
    for crop in range(4):
        for view in range(2):
            said = log_softmax(s_local[crop * batch : (crop + 1) * batch] / 0.1)
            local_loss += -(t[view * batch : (view + 1) * batch] * said).sum(-1).mean() / terms
    each = -(t_patch * log_softmax(s_patch / 0.1)).sum(-1)
    owners = np.nonzero(hidden)[0]
    ibot = sum(e / hidden[o].sum() for e, o in zip(each, owners, strict=True)) / (2 * batch)
    spread = koleo(student_tokens[:batch, 0]) + koleo(student_tokens[batch:, 0])
    losses = {name: float(value.detach()) for name, value in made(globals_, locals_, masks, tau).items()}
    assert losses["dino_global_loss"] == pytest.approx(0.7 * global_loss, rel=1e-6)
    assert losses["dino_local_loss"] == pytest.approx(0.7 * local_loss, rel=1e-6)
    assert losses["ibot_loss"] == pytest.approx(1.3 * ibot, rel=1e-6)
    assert losses["koleo_loss"] == pytest.approx(0.2 * spread, rel=1e-6)
    assert losses["published_koleo"] == pytest.approx(0.1 * spread, rel=1e-6)
    total = 0.7 * (global_loss + local_loss) + 1.3 * ibot + 0.2 * spread
    assert losses["loss"] == pytest.approx(total, rel=1e-6)


def sinkhorn(z: np.ndarray, tau: float) -> np.ndarray:
    q = np.exp(z / tau)
    q /= q.sum()
    for _ in range(3):
        q /= q.sum(0, keepdims=True) * q.shape[1]
        q /= q.sum(1, keepdims=True) * q.shape[0]
    return q * len(q)


def test_the_teacher_starts_as_a_copy_and_stays_in_eval_mode_without_gradient():
    made = DINOv2(create_encoder("vit_tiny_patch16_224", **SMALL), out_dim=24, hidden_dim=16, bottleneck_dim=8)
    student, teacher = made.student.state_dict(), made.teacher.state_dict()
    assert student.keys() == teacher.keys()
    assert all(torch.equal(student[name], teacher[name]) for name in student)
    made.train()
    assert made.student.training
    assert not any(module.training for module in made.teacher.modules())
    made(torch.randn(4, 3, 32, 32), None, torch.ones(4, 16, dtype=torch.bool), 0.05)["loss"].backward()
    assert all(p.grad is None for p in made.teacher.parameters())
    assert [name for name, p in made.student.named_parameters() if p.grad is None] == []


def test_the_teacher_is_the_moving_average_of_the_student():
    made = model()
    randomised(made.teacher, seed=5)
    before = {name: value.clone() for name, value in made.teacher.named_parameters()}
    made.update_teacher(0.9)
    for name, value in made.student.named_parameters():
        expected = 0.9 * before[name] + 0.1 * value
        torch.testing.assert_close(dict(made.teacher.named_parameters())[name], expected)


def test_centres_move_in_training_only():
    made = model(centering="centering", drop_path=0.0)
    start = made.dino_centering.center.clone()
    made.eval()(*crops(), 0.05)
    assert torch.equal(made.dino_centering.center, start)
    made.train()(*crops(), 0.05)
    assert not torch.equal(made.dino_centering.center, start)


def test_masked_patches_are_hidden_from_the_student_alone():
    made = model(koleo_weight=0.0).eval()
    globals_, locals_, masks = crops()
    losses = made(globals_, locals_, masks, 0.05)
    other = globals_.clone()
    other[0, :, :8, :8] += 1.0  # the first patch of the first crop, which is masked
    student = made.student.crops(globals_, masks, hide=True)
    changed = made.student.crops(other, masks, hide=True)
    torch.testing.assert_close(student.classes, changed.classes)
    assert float((made(other, locals_, masks, 0.05)["ibot_loss"] - losses["ibot_loss"]).abs().detach()) > 1e-6


def test_without_masks_and_local_crops_two_terms_remain():
    made = model().eval()
    globals_, _, masks = crops()
    losses = made(globals_, None, torch.zeros_like(masks), 0.05)
    assert float(losses["ibot_loss"].detach()) == 0
    assert "dino_local_loss" not in losses
    parts = losses["dino_global_loss"] + losses["koleo_loss"]
    torch.testing.assert_close(losses["loss"], parts)


@pytest.mark.parametrize("encoder", ["ccvit_tiny_patch4_32", "eva02_tiny_patch14_224", "vit_tiny_patch16_224"])
def test_every_family_of_encoders_learns_from_crops_of_both_sizes(encoder):
    made = DINOv2(create_encoder(encoder, **SMALL), out_dim=24, hidden_dim=16, bottleneck_dim=8, drop_path=0.3)
    globals_, locals_, masks = crops()
    losses = made.train()(globals_.float(), locals_.float(), masks, 0.05)
    losses["loss"].backward()
    missing = [name for name, p in made.student.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []


def test_registers_take_no_part_in_the_losses_but_in_attention():
    encoder = create_encoder("vit_small_patch14_reg4_dinov2", **SMALL)
    made = randomised(DINOv2(encoder, out_dim=24, hidden_dim=16, bottleneck_dim=8)).eval()
    globals_, locals_, masks = (x.float() if x.is_floating_point() else x for x in crops())
    assert made.student.crops(globals_, masks).patches.shape == (int(masks.sum()), 32)
    before = made(globals_, locals_, masks, 0.05)["loss"]
    with torch.no_grad():
        made.student.encoder.reg_token += torch.randn(32)  # the same for all would vanish in the norm
    assert float((made(globals_, locals_, masks, 0.05)["loss"] - before).abs().detach()) > 1e-5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g, s, m: (g[:5], s, m), "5 global crops are not two of each image"),
        (lambda g, s, m: (g, s[:7], m), "7 local crops are not equally many of each of 3 images"),
        (
            lambda g, s, m: (g, s, m[:2]),
            r"the masks have shape \(2, 16\); 6 global crops of 4x4 patches need \(6, 16\)",
        ),
        (lambda g, s, m: (g, s, m[:, :9]), r"the masks have shape \(6, 9\)"),
        (lambda g, s, m: (g[:2], None, m[:2]), "at least 2 images per process"),
        (lambda g, s, m: (g, s[..., :15], m), "image size 15 is not divisible by patch size 8"),
    ],
)
def test_batches_that_do_not_fit_are_refused(change, message):
    with pytest.raises(UsageError, match=message):
        model()(*change(*crops()), 0.05)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"centering": "sinkhorn"}, "did you mean sinkhorn_knopp"),
        ({"dino_weight": 0.0, "ibot_weight": 0.0}, "dino or ibot must be above 0"),
        ({"koleo_weight": -1.0}, "none may be negative"),
        ({"nlayers": 0}, "nlayers is 0; it must be at least 1"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(UsageError, match=message):
        model(**settings)


def test_an_encoder_without_class_token_is_refused():
    encoder = create_encoder("vit_tiny_patch16_224", class_token=False, global_pool="avg", **SMALL)
    with pytest.raises(UsageError, match="needs an encoder with a class token"):
        DINOv2(encoder, out_dim=8)


def test_a_head_of_one_layer_and_one_with_batch_norm():
    single = DINOHead(6, 5, bottleneck_dim=4, nlayers=1)
    assert isinstance(single.mlp, nn.Linear)
    assert single(torch.randn(2, 3, 6)).shape == (2, 3, 5)
    normed = DINOHead(6, 5, hidden_dim=7, bottleneck_dim=4, use_bn=True)
    assert [type(layer) for layer in normed.mlp] == [  # type: ignore[arg-type]
        nn.Linear, nn.BatchNorm1d, nn.GELU, nn.Linear, nn.BatchNorm1d, nn.GELU, nn.Linear,
    ]  # fmt: skip
    gains = single.last_layer.parametrizations.weight.original0  # type: ignore[union-attr]
    assert gains.requires_grad
    assert (gains == 1).all()


def test_copies_are_independent():
    made = model()
    other = copy.deepcopy(made)
    with torch.no_grad():
        next(other.parameters()).add_(1)
    assert not torch.equal(next(made.parameters()), next(other.parameters()))


def test_doubt_is_1_where_the_teacher_says_nothing_and_0_where_it_is_sure():
    assert float(doubt(torch.eye(6))) == pytest.approx(0, abs=1e-6)
    assert float(doubt(torch.full((4, 6), 1 / 6))) == pytest.approx(1, abs=1e-6)


def test_mean_entropy_is_1_where_all_prototypes_are_used_and_0_where_one_is():
    assert float(mean_entropy(torch.eye(6))) == pytest.approx(1, abs=1e-6)
    assert float(mean_entropy(torch.eye(6)[:1].expand(4, 6))) == pytest.approx(0, abs=1e-6)
