"""Sharpness-aware minimisation: its two passes written out, and a step of the engine that makes them."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from patchloom.encoders import create_encoder
from patchloom.models.bundle import save_bundle
from patchloom.systems.finetune.method import FinetuneConfig, FinetuneMethod
from patchloom.training.method import Method
from patchloom.training.metrics import read_metrics, series
from patchloom.training.run import fit
from patchloom.training.sam import SharpnessAware, gradient_norm, perturbed, steady_statistics


def test_the_gradient_is_the_one_at_w_plus_e():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    frozen = nn.Parameter(torch.ones(2).double())
    x, y = torch.randn(5, 4).double(), torch.tensor([0, 1, 1, 0, 1])
    values = {name: p.detach().clone() for name, p in model.named_parameters()}

    def gradients(at):
        leaves = {name: value.clone().requires_grad_() for name, value in at.items()}
        loss = F.cross_entropy(torch.func.functional_call(model, leaves, (x,)), y)
        return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))

    g = gradients(values)
    length = torch.cat([value.flatten() for value in g.values()]).norm()
    wanted = gradients({name: value + 0.3 * g[name] / length for name, value in values.items()})
    F.cross_entropy(model(x), y).backward()
    with perturbed([*model.parameters(), frozen], 0.3):
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name])
        assert torch.equal(parameter.detach(), values[name])  # to the bit
        assert not torch.allclose(parameter.grad, g[name])
    assert frozen.tolist() == [1.0, 1.0]


def test_nothing_moves_without_a_gradient():
    weight = nn.Parameter(torch.ones(3))
    weight.grad = torch.zeros(3)
    with perturbed([weight], 0.5):
        assert weight.tolist() == [1.0, 1.0, 1.0]
    assert float(gradient_norm([])) == 0.0


def test_running_statistics_stay_those_of_the_first_pass():
    norm = nn.BatchNorm1d(2).train()
    x = torch.randn(8, 2) + 3
    norm(x)
    mean, count = norm.running_mean.clone(), int(norm.num_batches_tracked)
    with steady_statistics(nn.Sequential(norm)):
        inside = norm(x + 5)
    assert torch.equal(norm.running_mean, mean)
    assert int(norm.num_batches_tracked) == count
    torch.testing.assert_close(inside.mean(0), norm.bias.expand(2), atol=1e-5, rtol=0)  # by the batch's statistics
    norm(x)
    assert not torch.equal(norm.running_mean, mean)


SETTINGS = {
    "data": "digits",
    "label_fraction": 0.1,
    "val_fraction": 0.1,
    "batch_size": 16,
    "max_steps": 4,
    "lr": 1e-3,
    "lr_base_batch": None,
    "init_scale": 1.0,
    "num_workers": 0,
    "probe_every": 0,
    "report": False,
    "health_every": 0,
    "log_every": 1,
    "checkpoint_every": 1,
    "drop_path": 0.3,
    "precision": "32-true",
    "accelerator": "cpu",
}


class Sharp(FinetuneMethod):
    """Fine-tuning by SAM, whose second pass is noted."""

    def attachments(self):
        return [SharpnessAware(self.sharpness)]

    def sharpness(self) -> float:
        return 0.5

    def training_loss(self, batch):
        losses = super().training_loss(batch)
        self.__dict__.setdefault("seen", []).append((self.repeating, float(losses["loss"].detach())))
        return losses


@pytest.fixture(scope="module", autouse=True)
def encoder(tmp_path_factory):
    torch.manual_seed(0)
    size = {"image_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 4}
    path = save_bundle(create_encoder("ccvit_tiny_patch4_32", **size), tmp_path_factory.mktemp("sam") / "small")
    SETTINGS["encoder"] = str(path)


def run(out, method=Sharp, **changes):
    config = FinetuneConfig(out=str(out), **{**SETTINGS, **changes})
    return fit("adapt finetune", method, config)


def weights(found):
    return load_file(found.model / "model.safetensors")


def test_both_passes_draw_alike_and_the_second_is_where_the_gradient_leads(tmp_path, monkeypatch):
    made = []
    original = Sharp.__init__
    monkeypatch.setattr(Sharp, "__init__", lambda self, *a: (original(self, *a), made.append(self))[0])
    monkeypatch.setattr(Sharp, "sharpness", lambda self: 1e-9)  # hardly moves: equal losses mean equal draws
    run(tmp_path / "a")
    seen = made[0].seen
    assert [again for again, _ in seen] == [False, True] * 4
    first, second = ([loss for again, loss in seen if again is which] for which in (False, True))
    assert first == pytest.approx(second, abs=1e-5)
    rows = read_metrics(tmp_path / "a" / "metrics.csv")
    assert series(rows, "nearby_loss")[1] == pytest.approx(series(rows, "loss")[1], abs=1e-5)


def test_a_step_counts_as_one_batch_however_it_is_accumulated(tmp_path):
    plain = {"drop_path": 0.0, "mixup": 0.0, "cutmix": 0.0, "max_steps": 2, "optimizer": "sgd", "lr": 0.1}
    whole = weights(run(tmp_path / "whole", **plain, batch_size=16))
    parts = weights(run(tmp_path / "parts", **plain, batch_size=8, accumulate=2))
    without = weights(run(tmp_path / "without", FinetuneMethod, **plain, batch_size=16))
    for name, value in whole.items():
        torch.testing.assert_close(value, parts[name], rtol=0, atol=2e-5)
    assert any((value - without[name]).abs().max() > 1e-4 for name, value in whole.items())


def test_cut_off_and_resumed_equals_never_cut_off(tmp_path, capsys):
    once = weights(run(tmp_path / "once", accumulate=2, batch_size=8))
    original, count = Method.training_step, []

    def failing(self, batch, batch_idx):
        count.append(1)
        if len(count) == 11:  # within the third step, whose second pass is under way
            assert self.repeating
            raise RuntimeError("cut off")
        return original(self, batch, batch_idx)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Method, "training_step", failing)
        with pytest.raises(RuntimeError, match="cut off"):
            run(tmp_path / "two", accumulate=2, batch_size=8)
    assert "going on" not in capsys.readouterr().err
    twice = weights(run(tmp_path / "two", accumulate=2, batch_size=8, resume=True))
    assert "going on after step 2 of" in capsys.readouterr().err
    assert once.keys() == twice.keys()
    assert all(torch.equal(once[name], twice[name]) for name in once)
