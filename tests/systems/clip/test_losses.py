"""The contrastive loss: its formula, what is no negative, and several processes."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from patchloom.systems.clip.losses import contrastive_loss


def pairs(count=6, width=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [F.normalize(torch.randn(count, width, generator=generator, dtype=torch.float64), dim=1) for _ in range(2)]


def written_out(images, texts, scale, same):
    total = 0.0
    for first, second in ((images, texts), (texts, images)):
        for i in range(len(first)):
            logits = [scale * first[i] @ second[j] for j in range(len(second)) if i == j or not same[i][j]]
            total = total - scale * first[i] @ second[i] + torch.stack(logits).logsumexp(0)
    return total / (2 * len(images))


@pytest.mark.parametrize("ids", [None, [1, 2, 1, 3, 2, 1]], ids=["all differ", "some say the same"])
def test_the_loss_is_its_formula(ids):
    images, texts = pairs()
    numbers = list(range(6)) if ids is None else ids
    same = [[a == b for b in numbers] for a in numbers]
    contrast = contrastive_loss(images, texts, torch.tensor(3.0), None if ids is None else torch.tensor(ids))
    torch.testing.assert_close(contrast.loss, written_out(images, texts, 3.0, same))


def test_the_loss_is_open_clips():
    open_clip = pytest.importorskip("open_clip")
    images, texts = pairs()
    expected = open_clip.ClipLoss()(images, texts, torch.tensor(14.0))
    torch.testing.assert_close(contrastive_loss(images, texts, torch.tensor(14.0)).loss, expected)


def test_what_says_the_same_does_not_push_apart():
    images, texts = pairs()
    images.requires_grad_()
    ids = torch.tensor([7, 7, 7, 7, 7, 7])  # all say the same: nothing is wrong, whatever they look like
    contrast = contrastive_loss(images, texts, torch.tensor(3.0), ids)
    contrast.loss.backward()
    assert float(contrast.loss.detach()) == 0.0
    assert images.grad.abs().max() == 0
    assert float(contrast.accuracy) == 1.0


PROCESSES = """
import sys
import torch
import torch.distributed as dist
import torch.nn.functional as F
from patchloom.systems.clip.losses import contrastive_loss

rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
generator = torch.Generator().manual_seed(0)
inputs = torch.randn(2, 8, 4, generator=generator)
ids = torch.tensor([1, 2, 3, 1, 2, 5, 1, 6])

def towers():
    generator = torch.Generator().manual_seed(1)
    made = torch.nn.ModuleDict({name: torch.nn.Linear(4, 6) for name in ("image", "text")})
    made.scale = torch.nn.Parameter(torch.tensor(1.5))
    for parameter in made.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return made

def loss_of(model, rows):
    images, texts = (F.normalize(model[n](inputs[k][rows]), dim=1) for k, n in enumerate(("image", "text")))
    return contrastive_loss(images, texts, model.scale.exp(), ids[rows]).loss

class Step(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model
    def forward(self, rows):
        return loss_of(self.model, rows)

parallel = towers()
rows = torch.arange(8).chunk(2)[rank]
step = torch.nn.parallel.DistributedDataParallel(Step(parallel))  # kept: its hooks live as long as it does
loss = step(rows)
loss.backward()
mean = loss.detach().clone()
dist.all_reduce(mean)
dist.destroy_process_group()
alone = towers()
whole = loss_of(alone, torch.arange(8))
whole.backward()
torch.testing.assert_close(mean / 2, whole.detach(), atol=1e-5, rtol=0)
for name, parameter in alone.named_parameters():
    torch.testing.assert_close(parallel.get_parameter(name).grad, parameter.grad, atol=1e-5, rtol=0)
"""


@pytest.mark.slow
def test_two_processes_give_loss_and_gradients_of_one(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(PROCESSES)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(script)]
    started = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store")], env=environment, stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    for process in started:
        assert process.wait(timeout=300) == 0, process.stderr.read().decode()


def test_similarities_keep_their_digits_in_mixed_precision():
    images, texts = (part.float() for part in pairs())
    whole = contrastive_loss(images, texts, torch.tensor(100.0)).loss
    with torch.autocast("cpu", torch.bfloat16):
        mixed = contrastive_loss(images, texts, torch.tensor(100.0)).loss
    torch.testing.assert_close(mixed, whole)
