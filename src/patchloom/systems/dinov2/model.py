"""DINOv2: a student learns to say of crops and hidden patches what its own moving average says of the whole view.

The algorithm without an engine: student and teacher, their heads, the three losses. "DINOv2: Learning Robust Visual
Features without Supervision", arXiv 2304.07193, and its published code.

>>> import torch
>>> from patchloom.encoders import create_encoder
>>> model = DINOv2(create_encoder("vit_tiny_patch16_224", image_size=64), out_dim=128, hidden_dim=64, bottleneck_dim=32)
>>> masks = torch.zeros(4, 16, dtype=torch.bool)
>>> masks[:2, :6] = True
>>> losses = model(torch.randn(4, 3, 64, 64), torch.randn(6, 3, 32, 32), masks, teacher_temp=0.04)
>>> sorted(name for name in losses if name.endswith("_loss"))
['dino_global_loss', 'dino_local_loss', 'ibot_loss', 'koleo_loss']
"""

from __future__ import annotations

import copy
import math
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from patchloom.base.ranges import PositiveInt, checked
from patchloom.encoders import Encoder, embed_dim, family_of, final_norm, grid_size, num_prefix_tokens, run_blocks
from patchloom.encoders.anysize import TIMM_RULE, PositionRule, embed_any_size
from patchloom.encoders.batch_drop import LEAST_RATE, can_run_on_part, run_blocks_on_part, set_drop_path
from patchloom.errors import UsageError, unknown_name
from patchloom.systems.dinov2.gram import Gram, to_grid
from patchloom.systems.dinov2.losses import (
    SoftmaxCentering,
    dino_loss,
    ibot_loss,
    koleo_loss,
    sinkhorn_knopp,
)

Centering = Literal["centering", "sinkhorn_knopp"]
GLOBAL_CROPS = 2


class DINOHead(nn.Module):
    """An MLP to a bottleneck, then cosine similarity with K prototypes (Caron et al. 2021, arXiv 2104.14294).

    Linear, GELU, …, Linear to the bottleneck, L2 normalisation, and a weight-normalised linear layer without bias
    whose gains start at 1 and are trained.

    Args:
        in_dim: Width of the tokens.
        out_dim: Prototypes K.
        hidden_dim: Width of the hidden layers.
        bottleneck_dim: Width of the normalised vector.
        nlayers: Linear layers up to the bottleneck; 1 is a single one.
        use_bn: Batch normalisation after each hidden layer.
        mlp_bias: Biases in the linear layers up to the bottleneck.

    Raises:
        UsageError: `nlayers` below 1.
    """

    @checked
    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        nlayers: PositiveInt = 3,
        use_bn: bool = False,
        mlp_bias: bool = True,
    ) -> None:
        super().__init__()
        self.out_dim = out_dim
        layers: list[nn.Module] = []
        for width in [in_dim, *[hidden_dim] * (nlayers - 2)] if nlayers > 1 else []:
            layers.append(nn.Linear(width, hidden_dim, bias=mlp_bias))
            layers += [nn.BatchNorm1d(hidden_dim)] if use_bn else []
            layers.append(nn.GELU())
        last = nn.Linear(hidden_dim if layers else in_dim, bottleneck_dim, bias=mlp_bias)
        self.mlp: nn.Module = nn.Sequential(*layers, last) if layers else last
        self.last_layer = nn.Linear(bottleneck_dim, out_dim, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        weight_norm(self.last_layer)
        gain: nn.Parameter = self.last_layer.parametrizations.weight.original0  # type: ignore[assignment, union-attr]
        nn.init.ones_(gain)

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., K) logits of (..., in_dim) tokens."""
        shape = x.shape[:-1]
        x = self.mlp(x.reshape(-1, x.shape[-1]))
        x = F.normalize(x, dim=-1, eps=1e-6 if x.dtype == torch.float16 else 1e-12)
        logits: Tensor = self.last_layer(x)
        return logits.reshape(*shape, self.out_dim)


class Crops(NamedTuple):
    """What an encoder says of a group of equally large crops."""

    classes: Tensor
    """(n, D) normed class tokens."""
    patches: Tensor
    """(M, D) normed patch tokens at the masked places, crop by crop."""
    every: Tensor | None = None
    """(n, T, D), all normed patch tokens, where they were asked for."""


class Distilled(nn.Module):
    """An encoder with its mask token and heads: the student, or its moving average.

    Args:
        encoder: Encoder without head that has a class token; its `mask_token` (1, D) is taken over where it has one.
        dino_head: Head of the class token.
        ibot_head: Head of the patch tokens; None: `dino_head` serves both.
        rule: How absolute positions are resampled for crops of another size.
    """

    def __init__(
        self, encoder: Encoder, dino_head: DINOHead, ibot_head: DINOHead | None, rule: PositionRule = TIMM_RULE
    ) -> None:
        super().__init__()
        self.encoder = encoder
        token = getattr(encoder, "mask_token", None)
        token = torch.zeros(1, embed_dim(encoder)) if token is None else token.detach().clone().reshape(1, -1)
        self.mask_token = nn.Parameter(token)
        self.dino_head = dino_head
        self.ibot_head = ibot_head
        self.rule = rule
        self.part_rate = 0.0

    def crops(self, images: Tensor, masks: Tensor | None = None, hide: bool = False, every: bool = False) -> Crops:
        """Return the class tokens of crops and their patch tokens at masked places.

        Args:
            images: (n, C, H, W), normalised.
            masks: (n, T) bool; None: no patch tokens are asked for.
            hide: Replace the masked patches by the mask token; the teacher sees them.
            every: Return all patch tokens as well.
        """
        hidden = masks if hide else None
        embedded = embed_any_size(self.encoder, images, hidden, self.mask_token if hide else None, self.rule)
        if self.training and self.part_rate > LEAST_RATE:
            x = run_blocks_on_part(self.encoder, embedded, self.part_rate)
        else:
            x, _ = run_blocks(self.encoder, embedded)
        # The norm acts on each token alone, so only the rows that are asked for go through it.
        prefix = num_prefix_tokens(self.encoder)
        mean = prefix == 0 and self.encoder.global_pool != "token"
        if every or mean:
            whole = final_norm(self.encoder, x)
            patches = whole[:, prefix:]
            classes = patches.mean(1) if mean else whole[:, 0]
            return Crops(classes, whole[:0, 0] if masks is None else patches[masks], patches if every else None)
        rows = x[:, 0] if masks is None else torch.cat([x[:, 0], x[:, prefix:][masks]])
        normed = final_norm(self.encoder, rows)
        return Crops(normed[: len(x)], normed[len(x) :])

    def forward(self, images: Tensor) -> Tensor:
        """Return the normed class tokens (n, D) of (n, C, H, W) normalised images of any size."""
        return self.crops(images).classes

    def heads(self, classes: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits of class tokens (n, D) and of patch tokens (M, D)."""
        if self.ibot_head is not None:
            return self.dino_head(classes), self.ibot_head(patches)
        logits = self.dino_head(torch.cat([classes, patches]))
        return logits[: len(classes)], logits[len(classes) :]


class DINOv2(nn.Module):
    """Student and teacher with the DINO, iBOT and KoLeo losses (`SSLMetaArch` of the published code).

    Args:
        encoder: Encoder without head that has a class token, or is of a kind that cannot have one, whose pooled patches
            stand for it; becomes the student's. The teacher starts as its copy.
        out_dim: Prototypes K of the image-level head; paper: 65 536, large models 131 072.
        hidden_dim: Width of the heads' hidden layers; paper: 2048.
        bottleneck_dim: Width of the normalised vector; paper: 256 (384 for large models' image-level head).
        nlayers: Linear layers of a head up to the bottleneck; paper: 3.
        use_bn: Batch normalisation in the heads; paper: none.
        separate_head: Give the patches a head of their own; else one head serves both.
        ibot_out_dim: Prototypes of the patches' own head; default: `out_dim`.
        ibot_bottleneck_dim: Bottleneck of the patches' own head; default: `bottleneck_dim`.
        ibot_hidden_dim: Width of its hidden layers; default: `hidden_dim`.
        ibot_nlayers: Its linear layers up to the bottleneck; default: `nlayers`.
        mlp_bias: Biases in the heads' linear layers; paper: yes.
        centering: How teacher logits become probabilities.
        dino_weight: Weight of the image-level loss; 0 leaves it out of the sum.
        ibot_weight: Weight of the patch-level loss.
        koleo_weight: Weight of KoLeo; paper: 0.1.
        koleo_topk: Neighbours each feature is pushed away from; paper: 1.
        koleo_across: Look for them in the batch of all processes, as DINOv3's distributed form does.
        koleo_group: Features looked among there; default: all.
        gram: Anchor the likenesses of patches, see `Gram`; default: not.
        student_temp: Temperature of the student; paper: 0.1.
        center_momentum: See `SoftmaxCentering`.
        drop_path: Stochastic depth rate, the same in all blocks.
        batch_drop: Above a rate of 0.1 leave whole samples out of a branch instead of computing and dropping them,
            where the encoder's blocks allow it.
        rule: How absolute positions are resampled for crops of another size; default: timm's.

    Raises:
        UsageError: Unknown centring, negative weights or none, or an encoder without class token.
    """

    def __init__(
        self,
        encoder: Encoder,
        *,
        out_dim: int = 65536,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        nlayers: int = 3,
        use_bn: bool = False,
        separate_head: bool = False,
        ibot_out_dim: int | None = None,
        ibot_bottleneck_dim: int | None = None,
        ibot_hidden_dim: int | None = None,
        ibot_nlayers: int | None = None,
        mlp_bias: bool = True,
        centering: Centering = "centering",
        dino_weight: float = 1.0,
        ibot_weight: float = 1.0,
        koleo_weight: float = 0.1,
        koleo_topk: int = 1,
        koleo_across: bool = False,
        koleo_group: int | None = None,
        gram: Gram | None = None,
        student_temp: float = 0.1,
        center_momentum: float = 0.9,
        drop_path: float = 0.0,
        batch_drop: bool = True,
        rule: PositionRule = TIMM_RULE,
    ) -> None:
        super().__init__()
        if centering not in ("centering", "sinkhorn_knopp"):
            raise unknown_name("centering", centering, ("centering", "sinkhorn_knopp"))
        if num_prefix_tokens(encoder) == 0 and family_of(encoder).has_class_token:
            raise UsageError("DINOv2 needs an encoder with a class token; this one has none")
        if min(dino_weight, ibot_weight, koleo_weight) < 0 or dino_weight + ibot_weight == 0:
            raise UsageError(
                f"the weights are dino {dino_weight:g}, ibot {ibot_weight:g}, koleo {koleo_weight:g}; none may be "
                f"negative, and dino or ibot must be above 0"
            )
        width = embed_dim(encoder)
        head = DINOHead(width, out_dim, hidden_dim, bottleneck_dim, nlayers, use_bn, mlp_bias)
        ibot_head = None
        if separate_head:
            ibot_head = DINOHead(
                width,
                ibot_out_dim or out_dim,
                ibot_hidden_dim or hidden_dim,
                ibot_bottleneck_dim or bottleneck_dim,
                ibot_nlayers or nlayers,
                use_bn,
                mlp_bias,
            )
        self.student = Distilled(encoder, head, ibot_head, rule)
        part = batch_drop and drop_path > LEAST_RATE and can_run_on_part(encoder)
        set_drop_path(encoder, 0.0 if part else drop_path)
        self.student.part_rate = drop_path if part else 0.0
        self.follow()
        self.centering = centering
        self.dino_centering = SoftmaxCentering(out_dim, center_momentum)
        self.ibot_centering = SoftmaxCentering((ibot_head or head).out_dim, center_momentum)
        self.dino_weight = dino_weight
        self.ibot_weight = ibot_weight
        self.koleo_weight = koleo_weight
        self.koleo: dict[str, Any] = {
            "topk": koleo_topk,
            "across_processes": koleo_across,
            "group_size": koleo_group,
        }
        self.gram = gram
        self.anchor: Encoder | None = None
        if gram is not None and gram.anchor == "frozen":
            self.anchor = copy.deepcopy(self.teacher.encoder)
        self.student_temp = student_temp
        self.train()

    def follow(self) -> None:
        """Make the teacher a copy of the student as it is now."""
        self.teacher = copy.deepcopy(self.student).requires_grad_(False).eval()
        if getattr(self, "anchor", None) is not None:
            self.anchor = copy.deepcopy(self.teacher.encoder)

    def take_anchor(self) -> None:
        """Keep the likenesses of the teacher as it is now from here on, where the anchor is a frozen one."""
        if self.anchor is not None:
            self.anchor.load_state_dict(self.teacher.encoder.state_dict())

    def train(self, mode: bool = True) -> DINOv2:
        """Set the mode; the teacher stays in eval mode."""
        super().train(mode)
        self.teacher.eval()
        if self.anchor is not None:
            self.anchor.eval()
        return self

    def forward(
        self,
        global_crops: Tensor,
        local_crops: Tensor | None,
        masks: Tensor,
        teacher_temp: float,
        anchor_crops: Tensor | None = None,
        anchored: bool = True,
    ) -> dict[str, Tensor]:
        """Return `loss` and its parts.

        Args:
            global_crops: (2B, C, H, W) normalised, the first crop of all images, then the second.
            local_crops: (L·B, C, h, w) normalised, crop-major too; None or empty without local crops.
            masks: (2B, T) or (2B, h, w) bool, patches of the global crops hidden from the student.
            teacher_temp: Temperature of the teacher.
            anchor_crops: (2B, C, H', W') the global crops as a frozen anchor sees them, normalised; default: as they
                are. What it says of them is resampled to the student's grid.
            anchored: Whether the Gram loss counts, where there is one.

        Returns:
            The terms as they enter the sum: `dino_global_loss`, `dino_local_loss`, `ibot_loss`, `koleo_loss`,
            `gram_loss`, and `loss`, their sum. Beside them, for the log: `published_koleo` and `published_ibot`, halved
            as the published code shows them; `teacher_entropy`, the entropy of the mean of the teacher's distributions
            over the batch as a share of log K (0: all images on one prototype), and `teacher_doubt`, the mean of their
            entropies, likewise (1: the teacher says nothing of any image).

        Raises:
            UsageError: An odd number of global crops, local crops that are no multiple of B, or masks of another
                grid.
        """
        batch, masks = self._check(global_crops, local_crops, masks)
        gram = self.gram if anchored else None
        class_targets, patch_targets = self.targets(global_crops, masks, teacher_temp)
        student = self.student.crops(global_crops, masks, hide=True, every=gram is not None)
        classes, groups = student.classes, GLOBAL_CROPS
        if local_crops is not None and len(local_crops):
            classes = torch.cat([classes, self.student.crops(local_crops).classes])
            groups += len(local_crops) // batch
        class_logits, patch_logits = self.student.heads(classes, student.patches)
        pairs = GLOBAL_CROPS + GLOBAL_CROPS * (groups - GLOBAL_CROPS)
        both = GLOBAL_CROPS * batch
        losses = {
            # Each student crop against the other view's teacher; both views in one mean, hence the factor.
            "dino_global_loss": dino_loss(class_logits[None, :both], class_targets[None], self.student_temp)
            * (GLOBAL_CROPS * self.dino_weight / pairs),
            "ibot_loss": self._ibot(patch_logits, patch_targets, masks),
        }
        if groups > GLOBAL_CROPS:
            local = class_logits[both:].unflatten(0, (-1, batch))
            teachers = class_targets.unflatten(0, (GLOBAL_CROPS, batch))
            losses["dino_local_loss"] = dino_loss(local, teachers, self.student_temp) * (self.dino_weight / pairs)
        if self.koleo_weight > 0:
            spread = [koleo_loss(view, **self.koleo) for view in student.classes.chunk(GLOBAL_CROPS)]
            losses["koleo_loss"] = torch.stack(spread).sum() * self.koleo_weight
            losses["published_koleo"] = losses["koleo_loss"].detach() / GLOBAL_CROPS
        if gram is not None and student.every is not None:
            losses["gram_loss"] = gram.loss(student.every, self.anchored(global_crops, anchor_crops), masks)
        terms = [value for name, value in losses.items() if name.endswith("_loss")]
        losses["published_ibot"] = losses["ibot_loss"].detach() / GLOBAL_CROPS
        losses["teacher_entropy"] = mean_entropy(class_targets)
        losses["teacher_doubt"] = doubt(class_targets)
        return {"loss": torch.stack(terms).sum(), **losses}

    @torch.no_grad()
    def targets(self, global_crops: Tensor, masks: Tensor, teacher_temp: float) -> tuple[Tensor, Tensor]:
        """Return the teacher's distributions; in training mode the centres move.

        Args:
            global_crops: (2B, C, H, W) normalised, crop-major.
            masks: (2B, T) bool, patches wanted; the teacher sees them.
            teacher_temp: Temperature.

        Returns:
            (2B, K) of the class tokens, the two crops swapped so that row i is the other view of student crop i;
            (M, K') of the masked patches.
        """
        teacher = self.teacher.crops(global_crops, masks)
        first, second = teacher.classes.chunk(GLOBAL_CROPS)
        classes, patches = self.teacher.heads(torch.cat([second, first]), teacher.patches)
        if self.centering == "sinkhorn_knopp":
            return sinkhorn_knopp(classes, teacher_temp), sinkhorn_knopp(patches, teacher_temp)
        return self.dino_centering(classes, teacher_temp), self.ibot_centering(patches, teacher_temp)

    @torch.no_grad()
    def anchored(self, global_crops: Tensor, anchor_crops: Tensor | None = None) -> Tensor:
        """Return the patch tokens (2B, T, D) whose likenesses are kept, of the grid of the global crops.

        Args:
            global_crops: (2B, C, H, W) normalised.
            anchor_crops: The same as a frozen anchor sees them, of any size; default: as they are.
        """
        if self.anchor is None:
            patches = self.teacher.crops(global_crops, every=True).every
            assert patches is not None
            return patches
        crops = global_crops if anchor_crops is None else anchor_crops
        x, _ = run_blocks(self.anchor, embed_any_size(self.anchor, crops, rule=self.teacher.rule))
        anchor_tokens = final_norm(self.anchor, x)[:, num_prefix_tokens(self.anchor) :]
        sizes = [(images.shape[-2], images.shape[-1]) for images in (crops, global_crops)]
        grid, student_grid = (grid_size(self.anchor, size) for size in sizes)
        return to_grid(anchor_tokens, grid, student_grid)

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """Move the teacher towards the student: t <- m t + (1 - m) s, encoder and heads.

        Args:
            momentum: Share m of the teacher that is kept, in [0, 1].
        """
        pairs = zip(self.teacher.parameters(), self.student.parameters(), strict=True)
        teacher, student = map(list, zip(*pairs, strict=True))
        torch._foreach_lerp_(teacher, student, 1 - momentum)
        # Statistics of a batch norm in the heads are no parameters, and the teacher, in eval mode, has none of its own.
        for theirs, ours in zip(self.teacher.modules(), self.student.modules(), strict=True):
            if isinstance(theirs, nn.BatchNorm1d):
                theirs.load_state_dict({**theirs.state_dict(), **dict(ours.named_buffers())})

    def _ibot(self, logits: Tensor, targets: Tensor, masks: Tensor) -> Tensor:
        # The published sum has the factors 2 (as the global term) and 1/2 (global crops), which cancel.
        return ibot_loss(logits, targets, masks, self.student_temp) * self.ibot_weight

    def _check(self, global_crops: Tensor, local_crops: Tensor | None, masks: Tensor) -> tuple[int, Tensor]:
        """Return B and the masks as (2B, T)."""
        batch, odd = divmod(len(global_crops), GLOBAL_CROPS)
        if odd:
            raise UsageError(f"{len(global_crops)} global crops are not two of each image")
        if local_crops is not None and len(local_crops) % batch:
            raise UsageError(f"{len(local_crops)} local crops are not equally many of each of {batch} images")
        masks = masks.flatten(1)
        height, width = grid_size(self.student.encoder, (global_crops.shape[-2], global_crops.shape[-1]))
        if masks.shape != (len(global_crops), height * width):
            raise UsageError(
                f"the masks have shape {tuple(masks.shape)}; {len(global_crops)} global crops of {height}x{width} "
                f"patches need {(len(global_crops), height * width)}"
            )
        return batch, masks


@torch.no_grad()
def mean_entropy(distributions: Tensor) -> Tensor:
    """Return the entropy of the mean of (n, K) distributions as a share of log K, in [0, 1]."""
    return doubt(distributions.mean(0, keepdim=True))


@torch.no_grad()
def doubt(distributions: Tensor) -> Tensor:
    """Return the mean of the entropies of (n, K) distributions as a share of log K, in [0, 1]."""
    return torch.special.entr(distributions).sum(1).mean() / math.log(distributions.shape[1])
