"""The base of every way to train an encoder: what binds a pure module to batches, optimiser and log.

A method file holds the algorithm as a plain `nn.Module` and a thin subclass of `Method` that says which settings
it has, what its data workers do to an image, and what the loss of a batch is. Everything else is here.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import lightning.pytorch as lp
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from patchloom.data import make_loader
from patchloom.encoders import (
    Encoder,
    create_backbone,
    create_encoder,
    depth,
    embed_dim,
    has_tokens,
    image_size,
    layer_of_parameter,
)
from patchloom.errors import UsageError
from patchloom.training.config import TrainConfig
from patchloom.training.ewa import average_experts_, expand_ffn, experts_of, share_rate_schedule
from patchloom.training.optim import adamw, decays, layer_of, parameter_groups, set_rates
from patchloom.training.sam import SharpnessAware
from patchloom.training.schedule import cosine, warmup_cosine, warmup_steps

if TYPE_CHECKING:
    from patchloom.data.base import Source, StreamSource
    from patchloom.report import Section

Transform = Callable[[Tensor, torch.Generator], dict[str, Tensor]]


class NonFiniteLossError(RuntimeError):
    """The loss is NaN or infinite; training stopped before the step was taken."""


class Method(lp.LightningModule):
    """A way to train an encoder.

    Subclasses set `config_class` and implement `transform` and `training_loss`; the other hooks have defaults.

    Attributes:
        any_backbone: Whether the encoder may be any image model of timm; else it is a ViT.
        config: The settings.
        encoder: The timm module under training, without head.
        steps_per_epoch: Optimiser steps per epoch, set by the engine before training.
        total_steps: Optimiser steps of the whole run, likewise.
        latest: The figures logged last.
    """

    config_class: ClassVar[type[TrainConfig]] = TrainConfig
    needs_labels: ClassVar[bool] = False
    any_backbone: ClassVar[bool] = False

    def __init__(self, config: TrainConfig, source: Source | StreamSource) -> None:
        super().__init__()
        torch.manual_seed(config.seed)
        self.config = config
        self.source = source
        self.started = time.monotonic()
        self.seconds_before = 0.0
        self.encoder: Encoder = self.build_encoder()
        if config.grad_checkpointing:
            _recompute(self.encoder)
        self.steps_per_epoch = 1
        self.total_steps = 1
        self.batches_done = 0
        self.ema: ModelEmaV3 | None = None
        self.last_batch_keys: list[str] = []
        self.sam = SharpnessAware()
        self.latest: dict[str, float] = {}

    def build_encoder(self) -> Encoder:
        """Return the encoder the settings name, with the weights of `init_from` where that is set.

        Raises:
            UsageError: Unknown encoder, impossible image size, or weights of another architecture.
        """
        config = self.config
        create = create_backbone if self.any_backbone else create_encoder
        encoder = create(
            config.encoder, image_size=config.image_size, in_chans=config.in_chans, drop_path=config.drop_path
        )
        if config.init_from is not None:
            load_weights(encoder, config.init_from, self.starting_weights)
        return encoder

    def starting_weights(self, encoder: Encoder, saved: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors of `init_from` as the encoder's; a method may make up what another kind of ViT lacks."""
        return saved

    @property
    def input_size(self) -> int:
        """Side of the training images in pixels."""
        height, width = image_size(self.encoder)
        if height != width:
            raise UsageError(f"training needs square images, not {height}x{width}; set image_size")
        return height

    # What a method says about itself.

    def prepare(self, source: Source | StreamSource, run_dir: Path) -> None:
        """Make what training needs besides the encoder, in `run_dir`; called in one process, unless it is there."""

    def load_prepared(self, run_dir: Path) -> None:
        """Load what `prepare` made; called in every process, on every start."""

    def training_source(self) -> Source | StreamSource:
        """Return what batches are drawn from: the source, or another form of it, such as its images in time order."""
        return self.source

    def repeats(self) -> int:
        """Return how often an image comes in a row, each time augmented anew."""
        return 1

    @abstractmethod
    def transform(self) -> Transform:
        """Return what data workers do to an image: (uint8 (C, H, W), generator) -> tensors of one sample."""

    @abstractmethod
    def training_loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return `loss` and whatever else is to be logged, as scalars."""

    def layer(self, name: str) -> int:
        """Return the layer of a parameter, for layer-wise learning rates."""
        own = name.removeprefix("encoder.")
        return layer_of(own, depth(self.encoder)) if has_tokens(self.encoder) else layer_of_parameter(self.encoder, own)

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        """Return whether weight decay applies to a parameter."""
        return decays(name, parameter)

    def sharpness(self) -> float:
        """Return ρ of sharpness-aware minimisation for the present step; 0, the default, for a plain step."""
        return 0.0

    def validate(self, device: torch.device) -> dict[str, Any]:
        """Return figures on held-out data after an epoch that calls for them; none by default."""
        return {}

    def report_sections(self, images: Tensor) -> list[Section]:
        """Return the method's own part of the report, for held-out images (n, C, H, W) uint8."""
        return []

    def summary(self) -> dict[str, Any]:
        """Return figures for `summary.json`."""
        return {}

    def lineage(self) -> dict[str, Any]:
        """Return what made the model besides its data, its settings and the weights it began with."""
        return {}

    def bundle_model(self) -> Encoder:
        """Return what is shipped: the encoder, or its moving average."""
        return self.encoder if self.ema is None else self.ema.module

    def save_model(self, model: Encoder, path: Path, lineage: dict[str, Any]) -> None:
        """Write what is shipped, the `bundle_model`, to a folder."""
        from patchloom.bundle import save_bundle

        save_bundle(model, path, lineage=lineage, overwrite=True)

    # What binds it to Lightning.

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        config = self.config
        self.last_batch_keys = list(batch["key"])
        losses = self.training_loss(batch)
        loss = losses["loss"]
        if not torch.isfinite(loss):
            raise NonFiniteLossError(self._account_of_failure(float(loss.detach()), losses))
        if self.sam.again:
            return loss
        if self.logs_now():
            self.record(losses | {"epoch": (self.batches_done + 1) / (self.steps_per_epoch * config.accumulate)})
        self.batches_done += 1  # here, because callbacks hear of a batch's end before the module does
        return loss

    def logs_now(self) -> bool:
        """Return whether the present step is one that is logged: every `log_every`-th, and the last."""
        return self.global_step % self.config.log_every == 0 or self.global_step == self.total_steps - 1

    def record(self, values: dict[str, Any]) -> None:
        """Log figures of the present step, averaged over processes; every process has to call it."""
        reduce = self.trainer.strategy.reduce
        figures = {
            name: float(
                reduce(value.detach().float().clone(), reduce_op="mean") if isinstance(value, Tensor) else value
            )
            for name, value in values.items()
        }
        self.latest |= figures
        if self.trainer.is_global_zero:
            for logger in self.trainer.loggers:
                logger.log_metrics(figures, step=self.global_step)

    def _account_of_failure(self, loss: float, losses: dict[str, Tensor]) -> str:
        lr = max((group["lr"] for group in self.trainer.optimizers[0].param_groups), default=0.0)
        names = ", ".join(self.last_batch_keys[:8])
        more = len(self.last_batch_keys) - 8
        names += f" and {more} more (failure.json lists them)" if more > 0 else ""
        parts = [
            name for name, value in losses.items() if name != "loss" and not torch.isfinite(torch.as_tensor(value))
        ]
        blame = f" from {', '.join(parts)}" if parts else ""
        return (
            f"the loss is {loss} at step {self.global_step}{blame} (last learning rate {lr:.3g}, batch: {names}); "
            f"the checkpoint before it is untouched; try a smaller lr or precision=32-true"
        )

    def configure_optimizers(self) -> torch.optim.Optimizer:
        config = self.config
        groups = parameter_groups(
            self,
            layer_decay=config.layer_decay,
            layer=self.layer,
            depth=depth(self.encoder),
            decay=self.decays,
        )
        return adamw(groups, betas=config.betas, eps=config.eps, fused=config.precision != "16-mixed")

    def peak_lr(self) -> float:
        """Return the learning rate after the warm-up, scaled to the global batch where that is asked for."""
        config = self.config
        if config.lr_base_batch is None:
            return config.lr
        world = self.trainer.world_size if self._trainer is not None else 1
        return config.lr * (config.batch_size * config.accumulate * world / config.lr_base_batch)

    def rates(self, step: int) -> tuple[float, float]:
        """Return the learning rate and weight decay of an optimiser step."""
        config = self.config
        warmup = warmup_steps(config.warmup_epochs, self.steps_per_epoch, self.total_steps)
        # A peak below min_lr is meant: the cosine must not climb.
        peak = self.peak_lr()
        lr = warmup_cosine(step, self.total_steps, warmup, peak, min(config.min_lr, peak))
        end = config.weight_decay if config.weight_decay_end is None else config.weight_decay_end
        return lr, cosine(step, self.total_steps, config.weight_decay, end)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        lr, weight_decay = self.rates(self.global_step)
        set_rates(optimizer, lr, weight_decay)
        if self.logs_now():
            self.record({"lr": lr, "weight_decay": weight_decay})
        if radius := self.sharpness():
            optimizer_closure = partial(self.sam.closure, self, optimizer_closure, optimizer, radius)
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if self.config.experts:
            rate = share_rate_schedule(self.config.share_schedule, self.config.share_rate, self.total_steps)
            average_experts_(experts_of(self.encoder), rate(self.global_step))
        if self.ema is not None:
            self.ema.update(self.encoder)
        optimizer.zero_grad()  # now, not before the next backward pass: the next forward pass then has their memory

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        largest = self.config.clip_grad if self.config.clip_grad is not None else float("inf")
        sharded = getattr(self.trainer.model, "clip_grad_norm_", None)  # FSDP knows the whole norm, a shard does not
        norm = sharded(largest) if sharded else nn.utils.clip_grad_norm_(self.parameters(), largest)
        if self.logs_now():
            self.record({"grad_norm": norm})

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.seed_draws(self.batches_done)
        if self.sharpness():
            self.sam.keep(batch, batch_idx, self.batches_done)

    def seed_draws(self, position: int) -> None:
        """Seed the draws inside the model (drop path, dropout) by a batch's place: a resumed run repeats them."""
        torch.manual_seed(hash((self.config.seed, position, self.global_rank)) & 0x7FFF_FFFF_FFFF_FFFF)

    def setup(self, stage: str) -> None:
        """Make what training needs in one process, load it in all, and start the moving average."""
        run_dir = Path(self.config.out)
        if self.trainer.is_global_zero:
            self.prepare(self.source, run_dir)
        self.trainer.strategy.barrier("prepare")
        self.load_prepared(run_dir)
        if self.config.experts and not experts_of(self.encoder):
            trained = self.config.init_from is not None or Path(self.config.encoder).exists()
            expand_ffn(
                self.encoder, self.config.experts, self.config.expert_layers, "copy" if trained else "independent"
            )
        if self.config.ema is not None and self.ema is None:
            self.ema = ModelEmaV3(self.encoder, decay=self.config.ema)
            self.ema.requires_grad_(False)
        if self.config.compile:
            for part in self.encoder.blocks if has_tokens(self.encoder) else [self.encoder]:
                part.compile()

    def train_dataloader(self) -> TrainingStream:
        """Return all batches of the run, from the present position on."""
        config = self.config
        loader = make_loader(
            self.training_source(),
            self.transform(),
            config.batch_size,
            seed=config.seed,
            shuffle=True,
            num_workers=config.num_workers,
            rank=self.trainer.global_rank,
            world_size=self.trainer.world_size,
            drop_last=True,
            pin_memory=self.device.type == "cuda",
            repeats=self.repeats(),
        )
        self.steps_per_epoch = len(loader) // config.accumulate
        if self.steps_per_epoch == 0:
            raise UsageError(
                f"accumulate={config.accumulate} needs {config.accumulate} batches per epoch, and {self.source.name} "
                f"gives {len(loader)} of batch_size={config.batch_size}; lower one of them"
            )
        self.total_steps = config.max_steps or config.epochs * self.steps_per_epoch
        return TrainingStream(loader, self)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["batches_done"] = self.batches_done
        checkpoint["total_steps"] = self.total_steps
        checkpoint["seconds"] = self.seconds()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.batches_done = int(checkpoint["batches_done"])
        self.seconds_before = float(checkpoint["seconds"])

    def seconds(self) -> float:
        """Return the time the run has taken so far, over all its starts."""
        return self.seconds_before + time.monotonic() - self.started

    def pixels(self, images: Tensor) -> Tensor:
        """Return a batch of uint8 images as floats in [0, 1] (floats are taken as they are)."""
        return images.float().div_(255) if images.dtype == torch.uint8 else images

    def describe(self) -> dict[str, Any]:
        """Return what the log and the report say about the model."""
        return {
            "encoder": self.config.encoder,
            "width": embed_dim(self.encoder),
            "depth": depth(self.encoder),
            "parameters": sum(p.numel() for p in self.encoder.parameters()),
            "trained_parameters": sum(p.numel() for p in self.parameters() if p.requires_grad),
        }


class TrainingStream:
    """All batches of a run in one pass, epoch after epoch, from where the run stands.

    Lightning sees a single long epoch: then there is one way to resume, in the middle of it, and the position
    in the data is ours to restore exactly.
    """

    def __init__(self, loader: Any, method: Method) -> None:
        self.loader = loader
        self.method = method
        self.total = method.total_steps * method.config.accumulate

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Iterator[dict[str, Any]]:
        per_epoch = self.method.steps_per_epoch * self.method.config.accumulate
        done = self.method.batches_done
        while done < self.total:
            epoch, offset = divmod(done, per_epoch)
            self.loader.set_position(epoch, offset)
            for batch in self.loader:
                yield batch
                done += 1
                if done % per_epoch == 0 or done == self.total:
                    break


def _recompute(encoder: Encoder) -> None:
    try:
        encoder.set_grad_checkpointing(True)
    except (AttributeError, AssertionError) as error:
        raise UsageError(f"a {type(encoder).__name__} cannot do grad_checkpointing; leave it out") from error


def load_weights(
    encoder: Encoder,
    path: str,
    convert: Callable[[Encoder, dict[str, Tensor]], dict[str, Tensor]] = lambda encoder, saved: saved,
) -> None:
    """Fill an encoder with the weights of a bundle or run of the same architecture.

    Args:
        encoder: What is filled.
        path: The bundle or run.
        convert: Turns its tensors into the encoder's, where they are of another kind.

    Raises:
        UsageError: The tensors do not match, with how many do.
    """
    from patchloom.bundle import load

    saved = convert(encoder, load(path).state_dict())
    own = encoder.state_dict()
    head = ("head.",)
    usable = {k: v for k, v in saved.items() if k in own and v.shape == own[k].shape}
    missing = [k for k in own if k not in usable and not k.startswith(head)]
    if missing:
        raise UsageError(
            f"{path} fits {len(usable)} of {len(own)} tensors of the encoder; missing or of another shape: "
            f"{', '.join(missing[:5])}{' …' if len(missing) > 5 else ''}; name the architecture and image size it has"
        )
    encoder.load_state_dict(usable, strict=False)
