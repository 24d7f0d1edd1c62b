"""Gates, losses, gradients and protection, against formulas written out here."""

from __future__ import annotations

import math

import pytest
import timm
import torch
from torch import Tensor

from patchloom.errors import UsageError
from patchloom.systems.gcab.drift import DriftProjector, cascade
from patchloom.systems.gcab.gates import TaskGates, steepness
from patchloom.systems.gcab.measures import accuracies
from patchloom.systems.gcab.model import GCAB

SHAPE = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 3, "num_heads": 2, "num_classes": 0}


def made(tasks: int = 4, name: str = "vit_tiny_patch16_224", **settings) -> GCAB:
    torch.manual_seed(0)
    encoder = timm.create_model(name, **SHAPE)
    return GCAB(encoder, tasks, **settings).double()


def randomised(model: GCAB, seed: int = 0) -> GCAB:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * 0.2)
    return model


def images(count: int = 4) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def test_steepness_rises_within_an_epoch_and_never_arrives():
    assert steepness(0, 10) == pytest.approx(1 / 800)
    assert steepness(5, 10) == pytest.approx((800 - 1 / 800) / 2 + 1 / 800)
    assert steepness(9, 10) < 800


def test_regulariser_is_one_ratio_over_both_gates():
    gates = TaskGates(3, 5, 7).double()
    e = [gates.width.weight, gates.hidden.weight]
    soft = [[1 / (1 + math.exp(-2.0 * float(x))) for x in table[2].detach()] for table in e]
    free = [
        [float(not any(float(table[task, i].detach()) > 0 for task in range(2))) for i in range(table.shape[1])]
        for table in e
    ]
    above = sum(m * f for ms, fs in zip(soft, free, strict=True) for m, f in zip(ms, fs, strict=True))
    assert float(gates.regulariser(2, 2.0).detach()) == pytest.approx(above / sum(map(sum, free)), rel=1e-12)
    first = [[1 / (1 + math.exp(-2.0 * float(x))) for x in table[0].detach()] for table in e]
    assert float(gates.regulariser(0, 2.0).detach()) == pytest.approx(sum(map(sum, first)) / 12, rel=1e-12)


def test_regulariser_of_saturated_gates_is_nothing():
    gates = TaskGates(2, 3, 4)
    torch.nn.init.ones_(gates.width.weight)
    torch.nn.init.ones_(gates.hidden.weight)
    assert float(gates.regulariser(1, 1.0).detach()) == 0
    assert gates.free(1) == 0


@pytest.mark.parametrize("s", [1 / 800, 1.0, 300.0])
def test_gradients_of_embeddings_are_compensated(s):
    gates = TaskGates(2, 4, 6, steepest=800).double()
    with torch.no_grad():
        gates.width.weight.mul_(3)
    for table in (gates.width, gates.hidden):
        table.weight.grad = torch.ones_like(table.weight) * 0.5
    gates.compensate_(s)
    for table in (gates.width, gates.hidden):
        for e, slope in zip(table.weight.flatten().tolist(), table.weight.grad.flatten().tolist(), strict=True):
            inside = max(-50.0, min(50.0, s * e))
            assert slope == pytest.approx(0.5 * 800 / s * (math.cosh(inside) + 1) / (math.cosh(e) + 1), rel=1e-9)


def test_embeddings_of_zero_are_closed_and_none_leaves_its_range():
    gates = TaskGates(1, 3, 3)
    with torch.no_grad():
        gates.width.weight.copy_(torch.tensor([[0.0, 1e-6, -9.0]]))
    assert gates.hard(0).width.tolist() == [0, 1, 0]
    gates.clamp_()
    assert gates.width.weight.min() == -6


def test_a_projector_has_as_many_parameters_as_published():
    count = sum(p.numel() for p in DriftProjector(384, 64).parameters())
    assert count == 344_832
    assert sum(p.numel() for p in DriftProjector(768, 196).parameters()) == 1_482_240


def test_the_cascade_goes_from_the_newest_task_back():
    steps = [torch.nn.Linear(3, 3).double() for _ in range(2)]
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    first, second, newest = cascade(x, steps)
    assert torch.equal(newest, x)
    assert torch.equal(second, steps[1](x))
    assert torch.equal(first, steps[0](steps[1](x)))


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "beit_base_patch16_224", "eva02_tiny_patch14_224"])
def test_losses_are_those_of_the_paper(name):
    model = randomised(made(name=name), 1)
    for count in (2, 3):
        model.add_task(count)
    model = randomised(model, 2).train()
    x, targets, s = images(), torch.tensor([0, 4, 3, 1]), 1.5
    found = model.training_losses(x, targets, s)
    patches = model.trunk(x)
    logits = torch.cat(
        [
            head(model.block(token, patches, gates)[:, 0])
            for token, head, gates in zip(
                model.class_tokens, model.heads, (model.gates.hard(0), model.gates.soft(1, s)), strict=True
            )
        ],
        1,
    )
    bce = (
        sum(
            -math.log(1 / (1 + math.exp(-value)))
            if column == targets[row]
            else -math.log(1 - 1 / (1 + math.exp(-value)))
            for row, values in enumerate(logits.tolist())
            for column, value in enumerate(values)
        )
        / logits.numel()
    )
    drift = (model.teacher(x) - model.projectors[0](patches)).square().sum().sqrt()
    assert float(found["bce"]) == pytest.approx(bce, rel=1e-9)
    assert float(found["drift"]) == pytest.approx(0.001 * float(drift), rel=1e-9)
    assert float(found["gate"]) == pytest.approx(0.05 * float(model.gates.regulariser(1, s)), rel=1e-12)
    assert float(found["loss"]) == pytest.approx(bce + float(found["drift"]) + float(found["gate"]), rel=1e-9)


def trained(model: GCAB, steps: int, first: int, count: int, decay: float = 0.1) -> None:
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=0.05, weight_decay=decay)
    x = images(8)
    for step in range(steps):
        s = steepness(step % 4, 4)
        targets = first + torch.arange(8) % count
        optimizer.zero_grad()
        model.training_losses(x, targets, s)["loss"].backward()
        model.mask_gradients_()
        model.gates.compensate_(s)
        torch.nn.utils.clip_grad_norm_(learning, 10_000)
        optimizer.step()
        model.after_step_()


def test_what_a_task_reserved_is_unchanged_to_the_bit_after_another_task():
    model = made().train()
    model.add_task(2)
    trained(model, 6, 0, 2)
    reserved = model.block.reserved(model.gates.cumulative(1))
    before = {name: parameter.detach().clone() for name, parameter in model.block.named_parameters()}
    tokens = model.trunk(images()).detach()
    model.eval()
    said = model.heads[0](model.block(model.class_tokens[0], tokens, model.gates.hard(0))[:, 0]).detach()
    model.train()
    model.add_task(3)
    trained(model, 6, 2, 3)
    moved = 0
    for name, parameter in model.block.named_parameters():
        mask = reserved.get(name, torch.ones_like(parameter)) > 0  # norms stand still altogether
        assert torch.equal(parameter[mask], before[name][mask]), name
        moved += int((parameter != before[name]).sum())
    assert moved > 0
    model.eval()
    again = model.heads[0](model.block(model.class_tokens[0], tokens, model.gates.hard(0))[:, 0])
    torch.testing.assert_close(again, said, rtol=0, atol=1e-12)


def test_without_strict_protection_weight_decay_alone_moves_reserved_weights():
    model = made(strict_protection=False).train()
    model.add_task(2)
    trained(model, 3, 0, 2)
    reserved = model.block.reserved(model.gates.cumulative(1))["attn.q.weight"] > 0
    before = model.block.attn.q.weight.detach().clone()
    model.add_task(2)
    trained(model, 2, 2, 2, decay=0.1)
    shrunk = before[reserved] * (1 - 0.05 * 0.1) ** 2
    torch.testing.assert_close(model.block.attn.q.weight[reserved], shrunk, rtol=1e-9, atol=0)


def test_a_frozen_encoder_needs_no_projectors():
    model = made(freeze_encoder=True)
    model.add_task(2)
    model.add_task(2)
    assert len(model.projectors) == 0
    assert model.teacher is None
    assert not any(parameter.requires_grad for parameter in model.trunk.parameters())


def test_tasks_that_cannot_be_are_refused():
    model = made(tasks=1)
    with pytest.raises(UsageError, match="there is no task yet"):
        model(images())
    with pytest.raises(UsageError, match="task 1 has no classes"):
        model.add_task(0)
    model.add_task(2)
    with pytest.raises(UsageError, match="made for 1 tasks"):
        model.add_task(2)
    with pytest.raises(UsageError, match="images of 9 patches; drift between tasks was learnt on 16"):
        DriftProjector(4, 16)(torch.zeros(1, 9, 4))


def test_figures_of_tasks():
    matrix = [[0.9, 0, 0], [0.7, 0.8, 0], [0.75, 0.5, 0.9]]
    found = accuracies(matrix, seen=[0.9, 0.75, 0.7])
    assert found["average_incremental_accuracy"] == pytest.approx(2.35 / 3)
    assert found["last_accuracy"] == 0.7
    assert found["forgetting"] == pytest.approx(((0.9 - 0.75) + (0.8 - 0.5)) / 2)
    assert "forgetting" not in accuracies([[0.5]], seen=[0.5])
