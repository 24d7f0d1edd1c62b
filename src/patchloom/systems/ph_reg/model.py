"""PH-Reg: an encoder with fresh registers learns, in one pass, what its original says on average over shifted views.

"Vision Transformers with Self-Distilled Registers", Chen, Yan, Zhou, Dai, Luo, NeurIPS 2025 (arXiv 2505.21501);
published code: github.com/0raiser0/PH-Reg.

>>> import timm
>>> encoder = timm.create_model("vit_tiny_patch16_224", num_classes=0)
>>> model = PHReg(encoder, num_registers=4, views=3)
>>> output = model(torch.randn(2, 3, 224, 224))
>>> output["target"].shape, model.student.reg_token.shape
(torch.Size([2, 14, 14, 192]), torch.Size([1, 4, 192]))
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from patchloom.encoders import Encoder, depth, grid_size, in_chans, intermediate_layers, normalize, patch_size
from patchloom.encoders.precision import at_least_float32
from patchloom.errors import UsageError
from patchloom.systems.ph_reg.registers import add_registers, folds_class_position
from patchloom.systems.ph_reg.views import aggregate_views, largest_shift, make_views, sample_offsets

GUARD = 1e-8


def feature_loss(target: Tensor, student: Tensor, mse_scale: float = 1.0) -> dict[str, Tensor]:
    """Return how far the student's features are from the target (PH-Reg, section 3), computed in float32 or better.

    Args:
        target: (…, C); no gradient.
        student: The same shape.
        mse_scale: Weight of the squared error.

    Returns:
        `cosine`, the mean cosine similarity over places; `mse`, the mean squared error over everything; and `loss`,
        1 - cosine + mse_scale * mse.
    """
    target, student = at_least_float32(target.detach()), at_least_float32(student)
    cosine = (_unit(target) * _unit(student)).sum(-1).mean()
    mse = (target - student).square().mean()
    return {"cosine": cosine, "mse": mse, "loss": 1 - cosine + mse_scale * mse}


def _unit(features: Tensor) -> Tensor:
    return features / (features.norm(dim=-1, keepdim=True) + GUARD)


def patch_features(encoder: Encoder, images: Tensor) -> Tensor:
    """Return the normed patch tokens (B, n, n, C), float32 or better, of (B, 3, S, S) normalised images."""
    patches = intermediate_layers(encoder, images, [-1])[0].patches
    height, width = grid_size(encoder)
    return at_least_float32(patches).unflatten(1, (height, width))


def unlock(
    encoder: Encoder,
    blocks: int = 1,
    pos_embed: bool = True,
    patch_embed: bool = True,
    registers: bool = True,
    folded: bool = False,
) -> list[str]:
    """Let some parameters of an encoder train, and no others.

    Args:
        encoder: The student.
        blocks: How many of the last blocks, whole; published: 1, for CLIP 2.
        pos_embed: The positions, where there are learnt ones.
        patch_embed: The convolution that makes patches.
        registers: The register tokens.
        folded: The class token holds its position (`folds_class_position`), and trains along with the positions.

    Returns:
        The names of the parameters that train.

    Raises:
        UsageError: More blocks than there are, or nothing that trains.
    """
    if not 0 <= blocks <= depth(encoder):
        raise UsageError(f"unlock_blocks is {blocks}; the encoder has {depth(encoder)} blocks")
    first = depth(encoder) - blocks
    begins = [f"blocks.{number}." for number in range(first, depth(encoder))]
    begins += ["pos_embed"] * pos_embed + ["cls_token"] * (pos_embed and folded)
    begins += ["patch_embed.proj."] * patch_embed + ["reg_token"] * registers
    names = []
    for name, parameter in encoder.named_parameters():
        parameter.requires_grad_(name.startswith(tuple(begins)))
        if parameter.requires_grad:
            names.append(name)
    if not names:
        raise UsageError("nothing is left that could train; add registers or unlock positions, patches or blocks")
    return names


class DenoisedTeacher(nn.Module):
    """A frozen encoder whose patch features are averaged over shifted and mirrored views of each image.

    It takes as many forward passes as there are views, and is a denoiser of its own.

    Args:
        encoder: The encoder; its gradients are switched off.
        views: V, how many copies of an image are seen, itself included.
        shift_fraction: Largest shift as a share of the grid.
        chunk: Images in one forward pass, for less memory; default: all views of all images.

    Raises:
        UsageError: The grid is not square, or too small to be shifted.
    """

    def __init__(
        self, encoder: Encoder, views: int = 10, shift_fraction: float = 0.15, chunk: int | None = None
    ) -> None:
        super().__init__()
        self.grid = square_grid(encoder)
        largest_shift(self.grid, shift_fraction)
        self.encoder = encoder.requires_grad_(False).eval()
        self.views, self.shift_fraction, self.chunk = views, shift_fraction, chunk

    def train(self, mode: bool = True) -> DenoisedTeacher:
        """Stay in eval mode."""
        return super().train(False)

    def features(self, images: Tensor) -> Tensor:
        """Return the features (B, n, n, C) of images (B, 3, S, S) as they are, normalised."""
        return patch_features(self.encoder, images)

    @property
    def fill(self) -> Tensor:
        """White (C,), as normalised for the encoder: what stands outside of a shifted image."""
        return normalize(torch.ones(1, in_chans(self.encoder), 1, 1), self.encoder).flatten()

    def draw(self, count: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Return offsets (count, V, 2) and mirrored (count, V) for as many images."""
        drawn = [sample_offsets(self.grid, self.views, self.shift_fraction, generator) for _ in range(count)]
        return torch.stack([offsets for offsets, _ in drawn]), torch.stack([flips for _, flips in drawn])

    @torch.no_grad()
    def forward(self, images: Tensor, offsets: Tensor | None = None, flips: Tensor | None = None) -> Tensor:
        """Return the mean features (B, n, n, C) of normalised images (B, 3, S, S).

        Args:
            images: The images.
            offsets: (B, V, 2) int64, see `sample_offsets`; default: drawn anew.
            flips: (B, V) bool.

        Raises:
            UsageError: Offsets without flips, or views in which some patch is not seen.
        """
        if (offsets is None) != (flips is None):
            raise UsageError("offsets and flips belong together; give both or neither")
        if offsets is None or flips is None:
            offsets, flips = self.draw(len(images))
        views, index = make_views(images, offsets, flips, patch_size(self.encoder), self.fill)
        seen = views.flatten(0, 1)
        features = torch.cat([self.features(part) for part in seen.split(self.chunk or len(seen))])
        target, _ = aggregate_views(features.unflatten(0, views.shape[:2]), index)
        return target


class PHReg(nn.Module):
    """Teacher and student, and what the student is held to.

    Args:
        encoder: The encoder to be cleaned, which becomes the teacher.
        num_registers: R, how many registers the student gets; published: 16.
        views: V, how many views the teacher's features are averaged over.
        shift_fraction: Largest shift as a share of the grid.
        mse_scale: Weight of the squared error beside the cosine.
        unlock_blocks: How many of the last blocks train.
        unlock_pos_embed: Let positions train.
        unlock_patch_embed: Let the patch embedding train.
        teacher_chunk: Images in one forward pass of the teacher; default: all.
        teacher: The teacher, where it is another than the encoder as it is; settings of views are then its own.

    Attributes:
        teacher: A `DenoisedTeacher`.
        student: A ViT of timm with the registers in it.
        trained: Names of the student's parameters that train.

    Raises:
        UsageError: The encoder takes no registers, or its grid is not square or too small.
    """

    old_registers: Tensor

    def __init__(
        self,
        encoder: Encoder,
        num_registers: int = 16,
        views: int = 10,
        shift_fraction: float = 0.15,
        mse_scale: float = 1.0,
        unlock_blocks: int = 1,
        unlock_pos_embed: bool = True,
        unlock_patch_embed: bool = True,
        teacher_chunk: int | None = None,
        teacher: DenoisedTeacher | None = None,
    ) -> None:
        super().__init__()
        model: Any = encoder
        student = add_registers(encoder, num_registers)
        folded = folds_class_position(encoder)
        self.trained = unlock(student, unlock_blocks, unlock_pos_embed, unlock_patch_embed, num_registers > 0, folded)
        self.student = student
        self.teacher = teacher or DenoisedTeacher(encoder, views, shift_fraction, teacher_chunk)
        self.mse_scale = mse_scale
        had = 0 if model.reg_token is None else int(model.reg_token.shape[1])
        kept = (student.reg_token if student.reg_token is not None else torch.empty(1, 0, model.embed_dim))[:, :had]
        self.register_buffer("old_registers", kept.detach().clone(), persistent=False)

    def features(self, images: Tensor) -> Tensor:
        """Return the student's features (B, n, n, C) of normalised images."""
        return patch_features(self.student, images)

    def forward(self, images: Tensor, offsets: Tensor | None = None, flips: Tensor | None = None) -> dict[str, Tensor]:
        """Return `loss`, `cosine` and `mse`, see `feature_loss`, with the `target` and `student` features (B, n, n, C).

        Args:
            images: (B, 3, S, S), normalised; the student sees them as they are.
            offsets: (B, V, 2), views of the teacher, see `sample_offsets`; default: drawn anew.
            flips: (B, V) bool.
        """
        target = self.teacher(images, offsets, flips)
        student = self.features(images)
        return {**feature_loss(target, student, self.mse_scale), "target": target, "student": student}

    @torch.no_grad()
    def hold_old_registers(self) -> None:
        """Put registers the encoder had before back to what they were; they share a tensor with those that train."""
        if had := self.old_registers.shape[1]:
            registers: Any = self.student.reg_token
            registers[:, :had] = self.old_registers


def square_grid(encoder: Encoder) -> int:
    """Return the patches along a side of the square images an encoder is set up for.

    Raises:
        UsageError: They are not square.
    """
    grid = grid_size(encoder)
    if len(grid) != 2 or grid[0] != grid[1]:
        raise UsageError(
            f"the encoder is set up for a grid of {'x'.join(map(str, grid))} patches; views are of square images, so "
            f"give one side as image_size"
        )
    return grid[0]
