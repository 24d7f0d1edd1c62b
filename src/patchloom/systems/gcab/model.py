"""Classes learnt task after task by one ViT, without keeping old images.

Cotogni et al. 2022, "Exemplar-free Continual Learning of Vision Transformers via Gated Class-Attention and Cascaded
Feature Drift Compensation", arXiv 2211.12292. Each task has a class token, a head and two gates; gates reserve part of
a shared class-attention block, and projectors lead the changed features of the encoder back to what a task knew.

>>> import timm
>>> encoder = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=0)
>>> model = GCAB(encoder, tasks=3)
>>> model.add_task(2)
>>> model.add_task(4)
>>> model.eval()(torch.zeros(5, 3, 32, 32)).shape
torch.Size([5, 6])
"""

from __future__ import annotations

import copy
from itertools import accumulate
from typing import Any

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn
from torch.nn import functional as F

from patchloom.encoders import Encoder, depth, embed, embed_dim, num_patches, num_prefix_tokens, run_blocks
from patchloom.errors import UsageError
from patchloom.systems.gcab.block import GatedClassAttentionBlock
from patchloom.systems.gcab.drift import DriftProjector, cascade
from patchloom.systems.gcab.gates import LARGEST, STEEPEST, Gates, TaskGates


class Trunk(nn.Module):
    """The patches that an encoder's first blocks make of images, without final norm and prefix tokens.

    Args:
        encoder: The encoder; the blocks that are not run are taken off it.
        blocks: Blocks that run; default: all but the last, whose place the gated block takes.
    """

    def __init__(self, encoder: Encoder, blocks: int | None = None) -> None:
        super().__init__()
        self.encoder = encoder
        self.num_tokens = num_patches(encoder)
        self.dim = embed_dim(encoder)
        self.encoder.blocks = self.encoder.blocks[: depth(encoder) - 1 if blocks is None else blocks]
        if (made := getattr(encoder, "patchloom_args", None)) is not None:  # what a bundle rebuilds it from
            arguments = {**made["model_args"], "depth": len(self.encoder.blocks)}
            encoder.patchloom_args = {**made, "model_args": arguments}
        for name in ("norm", "fc_norm"):  # nothing here runs them
            if isinstance(norm := getattr(encoder, name, None), nn.Module):
                norm.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """Return (B, N, D) for normalised images (B, C, H, W)."""
        patches, _ = run_blocks(self.encoder, embed(self.encoder, images))
        return patches[:, num_prefix_tokens(self.encoder) :]


class TaskHead(nn.Module):
    """Norm and classifier of one task.

    Attributes:
        num_classes: Its classes.
    """

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, num_classes)
        self.num_classes = num_classes
        trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, token: Tensor) -> Tensor:
        """Return logits (B, classes) of a token (B, D)."""
        logits: Tensor = self.head(self.norm(token))
        return logits


class Tasks(nn.Module):
    """What learns classes task after task: a head for each task, and one row of logits over all classes seen.

    Attributes:
        heads: Those of the tasks so far; each says its `num_classes`.
        class_names: Names of the classes in the order of the outputs, where they are known.
        task_names: Those of each task.
        pretrained_cfg: How images are normalised, as a timm model says it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList()
        self.class_names: list[str] = []
        self.task_names: list[list[str]] = []
        self.pretrained_cfg: dict[str, Any] = {}

    @property
    def num_classes(self) -> int:
        """Outputs."""
        return sum(self.class_counts)

    @property
    def class_counts(self) -> list[int]:
        """Classes of each task so far."""
        return [int(getattr(head, "num_classes")) for head in self.heads]  # noqa: B009 - a module to mypy

    @property
    def task(self) -> int:
        """Number of the newest task.

        Raises:
            UsageError: There is none yet.
        """
        if not len(self.heads):
            raise UsageError("there is no task yet; add_task makes the first")
        return len(self.heads) - 1

    def add_task(self, num_classes: int) -> None:
        """Begin another task: what belongs to the earlier ones stands still from now on."""
        raise NotImplementedError

    def training_losses(self, images: Tensor, targets: Tensor, s: float) -> dict[str, Tensor]:
        """Return the losses of a batch, weighted, and their sum under `loss`."""
        raise NotImplementedError

    def correct_gradients_(self, s: float) -> None:
        """Act after the backward pass."""

    def after_step_(self) -> None:
        """Act after an optimiser step."""

    def task_of_classes(self) -> Tensor:
        """Return the number of the task of each class (classes,) int64."""
        return torch.repeat_interleave(torch.arange(len(self.heads)), torch.tensor(self.class_counts))

    def class_slices(self) -> list[slice]:
        """Return where the logits of each task stand."""
        ends = list(accumulate(self.class_counts))
        return [slice(end - count, end) for end, count in zip(ends, self.class_counts, strict=True)]


class GCAB(Tasks):
    """An encoder that learns tasks in turn.

    Args:
        encoder: Becomes part of the model and is changed: its last block gives way to the gated one.
        tasks: How many there will be at most.
        num_heads: Heads of the gated block; default: those of the encoder's blocks.
        blocks: Blocks of the encoder that run; default: all but the last.
        mlp_ratio: Of the gated block.
        drop_path: Of the gated block.
        steepest: Largest factor in the gates' sigmoid.
        largest: Range of the task embeddings.
        lambda_gate: Weight of the share of free channels that a task takes.
        lambda_drift: Weight of the drift loss, for the whole batch: rescale it by the square root of the batch size.
        compensate: Learn and use projectors against drift.
        freeze_encoder: The encoder stands still, so that nothing drifts and there are no projectors (not in the paper).
        strict_protection: Put reserved weights back after each step: weight decay and momentum know of no mask.
        cascade: Use the projectors when classes are told; without them they only hold the encoder back (an ablation).
        gated: Whether there are gates at all; without them and `compensate` this is plain fine-tuning, task after task,
            by the same network: old tokens, heads and norms stand still, nothing else is protected.
    """

    def __init__(
        self,
        encoder: Encoder,
        tasks: int,
        *,
        num_heads: int | None = None,
        blocks: int | None = None,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        steepest: float = STEEPEST,
        largest: float = LARGEST,
        lambda_gate: float = 0.05,
        lambda_drift: float = 0.001,
        compensate: bool = True,
        freeze_encoder: bool = False,
        strict_protection: bool = True,
        cascade: bool = True,
        gated: bool = True,
    ) -> None:
        super().__init__()
        if num_heads is None:
            num_heads = _heads(encoder)
        self.trunk = Trunk(encoder, blocks)
        dim = self.trunk.dim
        self.block = GatedClassAttentionBlock(dim, num_heads, mlp_ratio, drop_path)
        self.block.apply(_initialise)
        self.gates = TaskGates(tasks, dim, self.block.hidden, steepest, largest)
        self.class_tokens = nn.ParameterList()
        self.projectors = nn.ModuleList()
        self.teacher: Trunk | None = None
        self.lambda_gate, self.lambda_drift = lambda_gate, lambda_drift
        self.compensates = compensate and not freeze_encoder
        self.strict_protection, self.cascade, self.gated = strict_protection, cascade, gated
        self._protected: dict[str, tuple[Tensor, Tensor]] = {}
        self.freeze_encoder = freeze_encoder
        if freeze_encoder:
            self.trunk.requires_grad_(False)
        if not gated:
            self.gates.requires_grad_(False)
        self.register_load_state_dict_post_hook(_protect_again)

    def add_task(self, num_classes: int) -> None:
        """Begin another task: what belongs to the earlier ones stands still from now on.

        Raises:
            UsageError: A task without classes, or one more than there can be.
        """
        if num_classes < 1:
            raise UsageError(f"task {len(self.heads) + 1} has no classes; leave it out")
        if len(self.heads) == self.gates.tasks:
            raise UsageError(
                f"the model was made for {self.gates.tasks} tasks and has learnt as many; gates of tasks are made in "
                f"advance, so start one with a larger max_tasks"
            )
        old = len(self.heads)
        dim = self.trunk.dim
        like = self.gates.width.weight
        self.class_tokens.requires_grad_(False)
        self.heads.requires_grad_(False)
        self.projectors.requires_grad_(False)
        if old:
            for module in (*self.trunk.modules(), *self.block.modules()):
                if isinstance(module, nn.LayerNorm):
                    module.requires_grad_(False)
            self._protect(old)
            if self.compensates:
                self.teacher = copy.deepcopy(self.trunk).requires_grad_(False).eval()
                self.projectors.append(DriftProjector(dim, self.trunk.num_tokens).to(like))
        token = nn.Parameter(torch.empty(1, 1, dim, device=like.device, dtype=like.dtype))
        trunc_normal_(token, std=0.02)
        self.class_tokens.append(token)
        self.heads.append(TaskHead(dim, num_classes).to(like))

    def train(self, mode: bool = True) -> GCAB:
        """Set the mode of all parts but those that stand still: the teacher, and an encoder that is frozen."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        if self.freeze_encoder:
            self.trunk.eval()
        return self

    def gates_of(self, task: int, s: float | None = None) -> Gates:
        """Return the gates of a task: hard ones of the earlier tasks, those of the newest at a steepness."""
        if not self.gated:
            return Gates(*(torch.ones_like(gate) for gate in self.gates.hard(task)))
        return self.gates.hard(task) if task < self.task else self.gates.soft(task, s or self.gates.steepest)

    def logits_of(self, patches: list[Tensor], s: float | None = None) -> list[Tensor]:
        """Return the logits (B, classes) of each task.

        Args:
            patches: What each task sees, (B, N, D).
            s: Steepness of the newest task's gates; default: the steepest.
        """
        logits = []
        for number, (token, head) in enumerate(zip(self.class_tokens, self.heads, strict=True)):
            seen = self.block(token, patches[number], self.gates_of(number, s))
            logits.append(head(seen[:, 0]))
        return logits

    def patches_of(self, images: Tensor) -> list[Tensor]:
        """Return what each task sees of images after training: through the projectors, where there are any."""
        patches = self.trunk(images)
        if not self.cascade or not len(self.projectors):
            return [patches] * (self.task + 1)
        return cascade(patches, list(self.projectors))

    def forward(self, images: Tensor, s: float | None = None) -> Tensor:
        """Return the logits (B, classes of all tasks) in the order of the tasks.

        While training no task sees through projectors, as published.

        Args:
            images: (B, C, H, W), normalised.
            s: Steepness of the newest task's gates; default: the steepest.

        Raises:
            UsageError: There is no task yet.
        """
        task = self.task
        patches = [self.trunk(images)] * (task + 1) if self.training else self.patches_of(images)
        return torch.cat(self.logits_of(patches, s), dim=1)

    def training_losses(self, images: Tensor, targets: Tensor, s: float) -> dict[str, Tensor]:
        """Return the losses of a batch, weighted, and their sum under `loss`.

        Args:
            images: (B, C, H, W), normalised.
            targets: (B,) int64, numbers among all classes seen so far.
            s: Steepness of the newest task's gates.

        Returns:
            `bce` (binary cross-entropy with all classes seen so far, mean over batch and classes), `gate` where there
            are gates, and after the first task, where drift is compensated, `drift` (Frobenius norm over the whole
            batch).
        """
        task = self.task
        patches = self.trunk(images)
        logits = torch.cat(self.logits_of([patches] * (task + 1), s), dim=1)
        truth = F.one_hot(targets, logits.shape[1]).to(logits.dtype)
        losses = {"bce": F.binary_cross_entropy_with_logits(logits, truth)}
        if self.gated:
            losses["gate"] = self.lambda_gate * self.gates.regulariser(task, s)
        if self.teacher is not None:
            with torch.no_grad():
                before = self.teacher(images)
            apart = before - self.projectors[task - 1](patches)
            losses["drift"] = self.lambda_drift * torch.linalg.vector_norm(apart)
        return {**losses, "loss": torch.stack(list(losses.values())).sum()}

    def correct_gradients_(self, s: float) -> None:
        """Act after the backward pass: take gradients off what is reserved, and scale those of the gates."""
        if self.gated:
            self.mask_gradients_()
            self.gates.compensate_(s)

    def mask_gradients_(self) -> None:
        """Take the gradient off what earlier tasks have reserved in the gated block."""
        if not self.task or not self.gated:
            return
        parameters = dict(self.block.named_parameters())
        for name, mask in self.block.reserved(self.gates.cumulative(self.task)).items():
            if (slope := parameters[name].grad) is not None:
                slope.mul_(1 - mask)

    @torch.no_grad()
    def after_step_(self) -> None:
        """Keep the task embeddings in their range and, with `strict_protection`, put back what is reserved."""
        self.gates.clamp_()
        parameters = dict(self.named_parameters())
        for name, (mask, value) in self._protected.items():
            parameter = parameters[name]
            if value.device != parameter.device:  # the model has moved since
                mask, value = self._protected[name] = mask.to(parameter.device), value.to(parameter.device)
            parameter.copy_(torch.where(mask, value, parameter))

    def _protect(self, tasks: int) -> None:
        """Remember what so many tasks have reserved: weights of the gated block, and their own embeddings."""
        self._protected = {}
        if not tasks or not self.strict_protection or not self.gated:
            return
        parameters = dict(self.named_parameters())
        masks = {f"block.{name}": mask for name, mask in self.block.reserved(self.gates.cumulative(tasks)).items()}
        for name in ("gates.width.weight", "gates.hidden.weight"):
            masks[name] = torch.zeros_like(parameters[name])
            masks[name][:tasks] = 1
        self._protected = {name: (mask > 0, parameters[name].detach().clone()) for name, mask in masks.items()}


def _heads(encoder: Encoder) -> int:
    """Return the heads of an encoder's blocks; of one whose blocks have none, as many as make them 64 wide."""
    block = encoder.blocks[0]
    known = getattr(getattr(block, "attn", block), "num_heads", None)
    return (
        int(known)
        if known
        else next(n for n in range(max(1, embed_dim(encoder) // 64), 0, -1) if embed_dim(encoder) % n == 0)
    )


def _protect_again(model: GCAB, _: object) -> None:
    """Take loaded weights for what is reserved: they are put back after every step, so they are what they were."""
    model._protect(max(0, len(model.heads) - 1))


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
