"""DINOv2 as a training method: settings, crops and masks, schedules, teacher, pictures.

The algorithm itself is in `self_distillation`. Papers: "DINOv2: Learning Robust Visual Features without Supervision",
arXiv 2304.07193; "RAD-DINO: Exploring Scalable Medical Image Encoders Beyond Text Supervision", arXiv 2401.10815;
"Phikon-v2, A large and public feature extractor for biomarker prediction", arXiv 2409.09173.

>>> import patchloom as pl  # doctest: +SKIP
>>> run = pl.pretrain("dinov2", data="my/xrays", out="runs/xrays", preset="rad_dino")  # doctest: +SKIP
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from patchloom.base.sizes import Size, compact, pair, size_text
from patchloom.data.base import Source, StreamSource
from patchloom.data.multicrop import MultiCrop
from patchloom.encoders import (
    Encoder,
    create_encoder,
    depth,
    has_tokens,
    image_size,
    in_chans,
    normalize,
    num_prefix_tokens,
    patch_size,
    plane_size,
)
from patchloom.encoders.anysize import DINOV2_RULE, TIMM_RULE
from patchloom.encoders.families import find_family
from patchloom.encoders.patches import patch_grid
from patchloom.errors import UsageError
from patchloom.io import written_whole
from patchloom.models.bundle import fetch_encoder
from patchloom.models.parts import load_mask_token
from patchloom.models.start import start_encoder
from patchloom.systems.dinov2.config import PRESETS, Dinov2Config
from patchloom.systems.dinov2.gram import gram_loss, refreshes_after
from patchloom.systems.dinov2.losses import (
    SoftmaxCentering,
    dino_loss,
    ibot_loss,
    koleo_loss,
    sinkhorn_knopp,
)
from patchloom.systems.dinov2.masks import draw_masks
from patchloom.systems.dinov2.model import DINOHead, DINOv2
from patchloom.training.ewa import experts_of
from patchloom.training.inputs import read_as
from patchloom.training.method import Method, Transform
from patchloom.training.optim import adamw
from patchloom.training.schedule import cosine, warmup_cosine, warmup_steps

if TYPE_CHECKING:
    from patchloom.report import Section

__all__ = [
    "PRESETS",
    "DINOHead",
    "DINOv2",
    "Dinov2Config",
    "Dinov2Method",
    "SoftmaxCentering",
    "dino_loss",
    "draw_masks",
    "gram_loss",
    "ibot_loss",
    "koleo_loss",
    "sinkhorn_knopp",
]

HEADS = "heads.safetensors"


class Dinov2Method(Method):
    """Self-distillation with crops and hidden patches (DINOv2; presets of RAD-DINO and Phikon-v2)."""

    config_class = Dinov2Config
    config: Dinov2Config

    def __init__(self, config: Dinov2Config, source: Source | StreamSource) -> None:
        super().__init__(config, source)
        self.local_size = local_size(config.local_size, self.input_size, patch_size(self.encoder))
        self.model = DINOv2(
            self.encoder,
            out_dim=config.out_dim,
            hidden_dim=config.head_hidden_dim,
            bottleneck_dim=config.bottleneck_dim,
            separate_head=config.separate_head,
            nlayers=config.head_layers,
            use_bn=config.head_batch_norm,
            mlp_bias=config.head_bias,
            ibot_out_dim=config.ibot_out_dim,
            ibot_bottleneck_dim=config.ibot_bottleneck_dim,
            ibot_hidden_dim=config.ibot_hidden_dim,
            ibot_nlayers=config.ibot_layers,
            centering=config.centering,
            dino_weight=config.dino_weight,
            ibot_weight=config.ibot_weight,
            koleo_weight=config.koleo_weight,
            koleo_topk=config.koleo_topk,
            koleo_across=config.koleo_across,
            koleo_group=config.koleo_group,
            gram=config.gram(),
            student_temp=config.student_temp,
            drop_path=config.drop_path,
            # A compiled block is left whole, so the branches in it cannot be run on a part of the batch.
            batch_drop=config.batch_drop and not config.compile,
            rule=DINOV2_RULE if num_prefix_tokens(self.encoder) == 1 else TIMM_RULE,
        )
        if self.image_token != "class token":
            print(f"there is no class token: the {self.image_token} stands for an image", file=sys.stderr)
        if config.heads_from is not None:
            load_heads(self.model, config.heads_from)
        if config.gram_from is not None and self.model.anchor is not None:
            load_anchor(self.model.anchor, config.gram_from)
        if config.ibot_weight == 0:
            # Unused, they would stall processes that wait for their gradients.
            self.model.student.mask_token.requires_grad_(False)
            if self.model.student.ibot_head is not None:
                self.model.student.ibot_head.requires_grad_(False)
        self.transform()  # refuses crops that do not fit before anything is written

    @property
    def image_token(self) -> str:
        """What of the output stands for a whole image."""
        if num_prefix_tokens(self.encoder):
            return "class token"
        return "first patch" if self.encoder.global_pool == "token" else "mean over patches"

    def build_encoder(self) -> Encoder:
        """Return a fresh encoder with the layer scale and registers asked for, or the one training continues from."""
        config = self.config
        start = config.init_from or (config.encoder if Path(config.encoder).exists() else None)
        size: dict[str, Any] = {"image_size": config.image_size, "in_chans": config.in_chans}
        if start is None:
            encoder = create_encoder(config.encoder, **size, **self._additions())
        else:
            if config.registers is not None:
                raise UsageError(f"registers are for fresh encoders; {start} is trained already, leave them unset")
            is_local = Path(start).exists()
            encoder = start_encoder(start, **size) if is_local else fetch_encoder(start, create_encoder, **size)
            _check_architecture(encoder, config)
            if (token := load_mask_token(start)) is not None:
                # The student's starts from it; the bundle of the run holds the encoder alone.
                encoder.register_buffer("mask_token", token.reshape(1, -1), persistent=False)
        read_as(encoder, config)
        if config.pixel_mean is not None:
            statistics = {"mean": config.pixel_mean, "std": config.pixel_std}
            encoder.pretrained_cfg = {**encoder.pretrained_cfg, **statistics}
        return encoder

    def _additions(self) -> dict[str, Any]:
        """Return the arguments that give a fresh encoder of the settings its layer scale and registers."""
        config, arguments = self.config, dict[str, Any]()
        if not timm.is_model(config.encoder):
            return arguments  # refused where it is created
        with torch.device("meta"):  # only its kind is asked for
            plain: Any = timm.create_model(config.encoder, num_classes=0)
        has_none = has_tokens(plain) and isinstance(getattr(plain.blocks[0], "ls1", None), nn.Identity)
        if config.layer_scale is not None and has_none:
            arguments["init_values"] = config.layer_scale
        if config.registers:
            family = find_family(plain)
            if family is None or not family.takes_registers:
                raise UsageError(f"a {type(plain).__name__} has no register tokens; leave registers unset")
            # As published: registers have no position, and the class token needs none where there are any.
            arguments |= {family.register_argument: config.registers, "no_embed_class": True}
        return arguments

    def transform(self) -> Transform:
        """Return the crops."""
        config = self.config
        return MultiCrop(
            self.global_size,
            self.local_size,
            config.local_crops,
            config.global_scale,
            config.local_scale,
            config.augmentation(),
        )

    @property
    def global_size(self) -> tuple[int, int]:
        """Size of the global crops as they are cut out: a frozen anchor may see more of them than the student."""
        size = pair(self.config.gram_crop_size or self.input_size)
        for side, least in zip(size, self.input_size, strict=True):
            if side < least or side % patch_size(self.encoder):
                raise UsageError(
                    f"gram_crop_size is {size_text(size)}; it must be at least the crops' "
                    f"{size_text(self.input_size)} pixels and a multiple of {patch_size(self.encoder)}"
                )
        return size

    def training_loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return the losses of a batch of crops."""
        config = self.config
        large = self.crops(batch["global"]) if self.global_size != self.input_size else None
        global_crops = self.crops(batch["global"], self.input_size)
        local_crops = self.crops(batch["local"]) if "local" in batch else None
        masks = self.masks(len(batch["global"])).to(global_crops.device)
        if self.step == config.gram_start and config.gram_from is None:
            self.model.take_anchor()
        return self.model(
            global_crops,
            local_crops,
            masks,
            self.teacher_temperature(self.step),
            anchor_crops=large,
            anchored=self.step >= config.gram_start,
        )

    def crops(self, views: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Return (B, n, C, h, w) uint8 crops as (n·B, C, h, w), crop-major and normalised; of `size` where given."""
        pixels = self.pixels(views.transpose(0, 1).flatten(0, 1))
        if size is not None and tuple(pixels.shape[-2:]) != size:
            low, high = pixels.amin(), pixels.amax()
            pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True).clamp(low, high)
        return normalize(pixels, self.encoder)

    def masks(self, batch_size: int) -> Tensor:
        """Return the masks (2B, T) of the present batch."""
        config = self.config
        rank, world = (self.global_rank, self.trainer.world_size) if self._trainer is not None else (0, 1)
        drawn = draw_masks(
            plane_size(self.encoder, "block masks"),
            batch_size,
            seed=config.seed,
            step=self.batches_done,
            rank=rank,
            world_size=world,
            probability=config.mask_probability if config.ibot_weight > 0 else 0.0,
            ratio=config.mask_ratio,
        )
        return drawn.flatten(1)

    # Schedules, each a function of the step alone.

    def rates(self, step: int) -> tuple[float, float]:
        """Return the learning rate and weight decay of a step; the rate follows the root of the global batch."""
        config, total = self.config, self.total_steps
        peak = config.lr
        if config.lr_base_batch is not None:
            world = self.trainer.world_size if self._trainer is not None else 1
            peak *= math.sqrt(config.batch_size * config.accumulate * world / config.lr_base_batch)
        warmup = warmup_steps(config.warmup_epochs, self.steps_per_epoch, total)
        lr = warmup_cosine(step, total, warmup, peak, min(config.min_lr, peak))
        end = config.weight_decay if config.weight_decay_end is None else config.weight_decay_end
        return lr, cosine(step, total, config.weight_decay, end)

    def teacher_temperature(self, step: int) -> float:
        """Return the teacher's temperature: a line from start to end, then constant."""
        config = self.config
        steps = min(round(config.teacher_temp_epochs * self.steps_per_epoch), self.total_steps * 3 // 10)
        return linear(step, steps, config.teacher_temp_start, config.teacher_temp)

    def teacher_momentum(self, step: int) -> float:
        """Return the share of the teacher that is kept after a step."""
        config = self.config
        return cosine(step, self.total_steps, config.teacher_momentum, config.teacher_momentum_end)

    def frozen(self, step: int) -> set[str]:
        """Return the parts that do not learn in a step: `last_layer`, `backbone`."""
        config, tenth = self.config, self.total_steps // 10
        last = min(round(config.freeze_last_layer_epochs * self.steps_per_epoch), tenth)
        backbone = min(config.freeze_backbone_steps, tenth)
        return {part for part, steps in (("last_layer", last), ("backbone", backbone)) if step < steps}

    # Optimiser: who learns how fast, what decays, what is clipped together.

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        """Return whether weight decay applies: to all but biases, norms and layer scale, as published."""
        return not (name.endswith(".bias") or "norm" in name or "gamma" in name)

    def part(self, name: str) -> str:
        """Return the part of the model a parameter belongs to: `backbone`, `heads` or `last_layer`."""
        if ".last_layer." in name:
            return "last_layer"
        return "heads" if "_head." in name else "backbone"

    def configure_optimizers(self) -> torch.optim.Optimizer:
        config, groups = self.config, dict[tuple[str, float, bool], dict[str, Any]]()
        blocks = depth(self.encoder)
        for name, parameter in self.named_parameters():
            if not parameter.requires_grad:
                continue
            part, scale = self.part(name), 1.0
            if part == "backbone":
                inner = name.removeprefix("encoder.").removeprefix("model.student.")
                scale = config.layer_decay ** (blocks + 1 - self.layer(f"encoder.{inner}"))
                scale *= config.patch_embed_lr if inner.startswith("patch_embed.") else 1.0
            key = (part, scale, self.decays(name, parameter))
            group = groups.setdefault(
                key, {"params": [], "names": [], "lr_scale": scale, "full_scale": scale, "decays": key[2], "part": part}
            )
            group["params"].append(parameter)
            group["names"].append(name)
        ordered = [groups[key] for key in sorted(groups, reverse=True)]
        return adamw(ordered, betas=config.betas, eps=config.eps, fused=config.precision != "16-mixed")

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        frozen = self.frozen(self.step)
        for group in optimizer.param_groups:
            group["lr_scale"] = 0.0 if group["part"] in frozen else group["full_scale"]
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)

    def before_step(self) -> None:
        """Note what the teacher is held to."""
        if self.logs_now():
            momentum, temperature = self.teacher_momentum(self.step), self.teacher_temperature(self.step)
            self.record({"teacher_momentum": momentum, "teacher_temperature": temperature})

    def after_step(self) -> None:
        """Move the teacher, and take the anchor anew from it where it is time to."""
        config, done = self.config, self.step + 1
        self.model.update_teacher(self.teacher_momentum(self.step))
        if refreshes_after(done, config.gram_update_every, config.gram_first_update, config.gram_updates):
            self.model.take_anchor()

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        largest = self.config.clip_grad if self.config.clip_grad is not None else float("inf")
        student = self.model.student
        parts: dict[str, list[nn.Parameter]] = {
            "grad_norm": [*student.encoder.parameters(), student.mask_token],
            "dino_head_grad_norm": list(student.dino_head.parameters()),
        }
        if student.ibot_head is not None:
            parts["ibot_head_grad_norm"] = list(student.ibot_head.parameters())
        norms = {name: nn.utils.clip_grad_norm_(parameters, largest) for name, parameters in parts.items()}
        if self.logs_now():
            self.record(norms)

    # What is left behind.

    def setup(self, stage: str) -> None:
        """Give the teacher the experts the student got, and compile its blocks where the student's are."""
        super().setup(stage)
        if experts_of(self.encoder) and not experts_of(self.model.teacher):
            self.model.follow()
            if self.config.gram_from is not None and self.model.anchor is not None:
                raise UsageError("experts and gram_from do not go together: the anchor has none; leave one of them out")
            if self.config.heads_from is not None:
                load_heads(self.model, self.config.heads_from)
        if self.config.compile:
            for block in self.model.teacher.encoder.blocks:
                block.compile()

    def bundle_model(self) -> Encoder:
        """Return the teacher's encoder."""
        return self.model.teacher.encoder

    def on_fit_end(self) -> None:
        """Keep the heads beside the bundle: training can go on from them (`heads_from`)."""
        if self.trainer.is_global_zero:
            save_heads(self.model, Path(self.config.out) / HEADS)

    def summary(self) -> dict[str, Any]:
        """Return what the crops and heads are."""
        model = self.model
        return {
            "global_size": compact(self.input_size),
            "local_size": self.local_size if self.config.local_crops else None,
            "prototypes": self.config.out_dim,
            "head_parameters": sum(p.numel() for n, p in model.student.named_parameters() if "_head." in n),
            "registers": max(num_prefix_tokens(self.encoder) - 1, 0),
            "image_token": self.image_token,
            "batch_drop": model.student.part_rate > 0,
            "anchor": None if model.gram is None else self.config.gram_from or model.gram.anchor,
        }

    def report_sections(self, images: Tensor) -> list[Section]:
        """Return attention of teacher and student, the teacher's schedule and entropy, and the use of prototypes."""
        from patchloom.systems.dinov2.report import sections

        return sections(self, images)


def linear(step: int, steps: int, start: float, end: float) -> float:
    """Return the value at a step of a line that takes `steps` steps, both ends included, and stays at `end`."""
    return end if step >= steps else start + (end - start) * step / max(1, steps - 1)


def local_size(asked: Size | None, global_size: Size, patch: int) -> Size:
    """Return the size of the local crops: as asked for, or 3/7 of the global ones in whole patches (96 of 224)."""
    if asked is not None:
        patch_grid(pair(asked), patch)
        return asked
    high, wide = (max(1, round(side * 3 / 7 / patch)) * patch for side in pair(global_size))
    return compact((high, wide))


def save_heads(model: DINOv2, path: Path) -> None:
    """Write everything but the two encoders: heads, mask tokens, centres."""
    from safetensors.torch import save_file

    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    heads = {name: value for name, value in state.items() if _of_heads(name)}
    with written_whole(path) as temporary:
        save_file(heads, temporary)


def load_heads(model: DINOv2, path: str) -> None:
    """Fill heads, mask tokens and centres with those of an earlier run.

    Raises:
        UsageError: There are none, or they are of another size (with both).
    """
    from patchloom.base.stored import read_tensors

    file = Path(path) / HEADS if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise UsageError(f"there are no heads at {file}; heads_from takes the folder of a finished dinov2 run")
    state, state_dict = read_tensors(file), model.state_dict()
    names = [name for name in state_dict if _of_heads(name)]
    wrong = [n for n in names if n not in state or state[n].shape != state_dict[n].shape] + [
        n for n in state if n not in state_dict
    ]
    if wrong:
        name = wrong[0]
        shape, needed = (tuple(each[name].shape) if name in each else "none" for each in (state, state_dict))
        raise UsageError(
            f"the heads in {file} do not fit: {name} is {shape} there and {needed} here; use the out_dim, "
            f"head_hidden_dim, bottleneck_dim and separate_head of that run"
        )
    model.load_state_dict(state, strict=False)


def load_anchor(anchor: Encoder, path: str) -> None:
    """Fill a frozen anchor with the encoder of a bundle or run.

    Raises:
        UsageError: It is of another shape.
    """
    shape: dict[str, Any] = {"image_size": image_size(anchor), "in_chans": in_chans(anchor)}
    encoder = start_encoder(path, **shape) if Path(path).exists() else fetch_encoder(path, create_encoder, **shape)
    state, state_dict = encoder.state_dict(), anchor.state_dict()
    if wrong := [name for name in state_dict if name not in state or state[name].shape != state_dict[name].shape]:
        raise UsageError(
            f"the encoder in {path} does not fit as gram_from: {wrong[0]} is "
            f"{tuple(state[wrong[0]].shape) if wrong[0] in state else 'missing'} there, and the student's is "
            f"{tuple(state_dict[wrong[0]].shape)}"
        )
    anchor.load_state_dict({name: state[name] for name in state_dict})


def _of_heads(name: str) -> bool:
    """Return whether a tensor of the model is of its heads, mask tokens or centres, not of an encoder."""
    return ".encoder." not in name and not name.startswith("anchor.")


def _check_architecture(encoder: Encoder, config: Dinov2Config) -> None:
    """Refuse an encoder setting that contradicts what training continues from."""
    architecture = encoder.patchloom_args["architecture"]
    defaults = {Dinov2Config.encoder, *(preset["encoder"] for preset in PRESETS.values())}
    if config.init_from is None or config.encoder in (architecture, *defaults):
        return
    raise UsageError(f"init_from={config.init_from} holds a {architecture}, not a {config.encoder}; leave encoder out")
