"""The base of every way to train an encoder: what binds a pure module to batches, optimiser and log.

A method file holds the algorithm as a plain `nn.Module` and a thin subclass of `Method` that says which settings
it has, what its data workers do to an image, and what the loss of a batch is. Everything else is here.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import lightning.pytorch as lp
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn

from patchloom.data.kinds import KINDS
from patchloom.data.pixels import unit
from patchloom.data.sample import Transform
from patchloom.encoders import (
    Encoder,
    create_backbone,
    create_encoder,
    depth,
    embed_dim,
    has_tokens,
    image_size,
    input_size,
    kind_of,
    layer_of_parameter,
)
from patchloom.encoders.create import recompute_blocks
from patchloom.encoders.families import find_family
from patchloom.encoders.patches import Grid
from patchloom.errors import UsageError
from patchloom.models.start import load_weights, start_encoder
from patchloom.training.attachment import Attachment
from patchloom.training.config import TrainConfig, plain_settings
from patchloom.training.failure import non_finite
from patchloom.training.inputs import open_training_images, read_as
from patchloom.training.optim import adamw, decays, parameter_groups, set_rates
from patchloom.training.options import EncoderOptions, start_of
from patchloom.training.phases import Loss, Phase, Span, Stage, phased_step
from patchloom.training.saved import steps_done
from patchloom.training.schedule import cosine, warmup_cosine, warmup_steps
from patchloom.training.stream import TrainingStream, open_stream, stage_loader

if TYPE_CHECKING:
    from patchloom.data.base import Source, StreamSource
    from patchloom.report import Section


class Method(lp.LightningModule):
    """A way to train an encoder.

    Subclasses set `config_class` and implement `transform` and `training_loss`; the other hooks have defaults. A method
    with several optimisers says so by `phases`, one that learns one thing after another by `stages`.

    Attributes:
        kinds: Names of the kinds of samples it takes (`data.kinds`), which is what sources it trains on hold.
        any_backbone: Whether the encoder may be any image model of timm; else it is a ViT.
        probed: Whether probe and health look at the encoder while it trains; not where something else is what learns.
        measures: Whether the run is part of a measurement: no advice is given on it, and no checkpoint per epoch kept.
        fused: Whether AdamW goes over memory once; its last bits differ from those of the plain one.
        config: The settings.
        encoder: The timm module under training, without head.
        attached: What rides on the run, set by the engine before training.
        step: Steps done, however many optimisers a step has.
        stage: Number of the present stage.
        steps_per_epoch: Steps per epoch of the present stage, set by the engine before training.
        total_steps: Steps of the whole run, likewise.
        images_left_out: Images that an epoch leaves out because they do not fill a step, likewise.
        images_repeated: Images that come once more in an epoch, so that every process takes as many, likewise.
        repeating: Whether the present forward pass is one besides the step's own, which counts and logs nothing.
        latest: The figures logged last.
    """

    config_class: ClassVar[type[TrainConfig]] = TrainConfig
    needs_labels: ClassVar[bool] = False
    kinds: ClassVar[tuple[str, ...]] = ("image",)
    any_backbone: ClassVar[bool] = False
    probed: ClassVar[bool] = True
    measures: ClassVar[bool] = False
    fused: ClassVar[bool] = True

    def __init__(self, config: TrainConfig, source: Source | StreamSource) -> None:
        super().__init__()
        torch.manual_seed(config.seed)
        self.config = config
        self.source = source
        self.started = time.monotonic()
        self.seconds_before = 0.0
        self.encoder: Encoder = self.build_encoder()
        if (kind := kind_of(self.encoder)) not in ("image", *self.kinds):
            wanted = " or ".join(KINDS[name].plural for name in self.kinds)
            raise UsageError(f"the encoder takes {KINDS[kind].plural}, and this method is for {wanted}")
        if {kind, source.kind.name} <= set(self.kinds) and kind != source.kind.name:
            raise UsageError(
                f"{source.name} holds {source.kind.plural}, and the encoder {config.encoder} takes "
                f"{KINDS[kind].plural}; name an encoder of {source.kind.plural}"
            )
        if config.grad_checkpointing:
            recompute_blocks(self.encoder)
        self.attached: Sequence[Attachment] = ()
        self.step = 0
        self.stage = 0
        self.spans: list[Span] = []
        self.steps_per_epoch = 1
        self.total_steps = 1
        self.batches_done = 0
        self.images_left_out = self.images_repeated = 0
        self.lanes: int | None = None
        self.repeating = False
        self.last_batch_keys: list[str] = []
        self.latest: dict[str, float] = {}
        self.held: list[tuple[dict[str, Any], int]] = []

    @classmethod
    def open_data(cls, config: Any) -> tuple[Source | StreamSource, Any]:
        """Return what the settings name as data, and the settings with what was settled about it.

        Raises:
            UsageError: It cannot be opened or read as asked.
        """
        return open_training_images(config)

    def build_encoder(self) -> Encoder:
        """Return the encoder the settings name, with the weights of `init_from` where that is set.

        Raises:
            UsageError: Unknown encoder, impossible image size, or weights of another architecture.
        """
        config = self.config
        create = create_backbone if self.any_backbone else create_encoder
        encoder = start_encoder(
            config.encoder,
            create,
            image_size=config.image_size,
            in_chans=config.in_chans,
            drop_path=config.drop_path,
            **self.encoder_arguments(),
        )
        if (start := start_of(config)) is not None:
            load_weights(encoder, start, self.starting_weights)
        return read_as(encoder, config)

    def encoder_arguments(self) -> dict[str, Any]:
        """Return arguments of a fresh encoder that the method decides; by default none."""
        return {}

    def starting_weights(self, encoder: Encoder, saved: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors of `init_from` as the encoder's; a method may make up what another kind of ViT lacks."""
        return saved

    @property
    def input_size(self) -> tuple[int, int]:
        """Height and width of the training images in pixels."""
        return image_size(self.encoder)

    @property
    def sample_size(self) -> Grid:
        """Sides of what the encoder takes, without channels: (H, W), of clips (T, H, W), of volumes (D, H, W)."""
        return input_size(self.encoder)

    def samples(self, batch: dict[str, Any]) -> Tensor:
        """Return the samples of a batch, (B, C, *sides), whatever their kind, as the data workers handed them out."""
        found: Tensor = batch[self.source.kind.name]
        return found

    # What a method says about itself.

    def prepare(self, source: Source | StreamSource, run_dir: Path) -> None:
        """Make what training needs besides the encoder, in `run_dir`; called in one process, unless it is there."""

    def load_prepared(self, run_dir: Path) -> None:
        """Load what `prepare` made; called in every process, on every start."""

    @classmethod
    def images_to_learn_from(cls, config: Any, source: Source | StreamSource) -> int | None:
        """Return how many images a run of these settings would learn from, about; None where nobody knows."""
        from patchloom.data.base import Source

        return len(source) if isinstance(source, Source) else None

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
        """Return the layer of a parameter, for learning rates by layer; what is not the encoder's learns as a head."""
        last = depth(self.encoder) + 1
        if not name.startswith("encoder."):
            return last
        return layer_of_parameter(self.encoder, name.removeprefix("encoder."))

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        """Return whether weight decay applies to a parameter."""
        family = find_family(self.encoder)
        left_alone = set() if family is None else family.undecayed(self.encoder)
        return decays(name, parameter) and not any(name.endswith(f".{own}") for own in left_alone)

    def phases(self) -> list[Phase]:
        """Return the parts of a step with several optimisers; by default none: `training_loss` is the whole step."""
        return []

    def stages(self) -> list[Stage]:
        """Return the parts of the run; by default there is one."""
        return [Stage("train")]

    def enter_stage(self, number: int) -> None:
        """Get ready for a stage (new heads, new tasks); a resumed run calls it for those it has passed, in turn."""

    def enter_trial(self) -> None:
        """Get ready for a few steps outside a run, in the stage that takes most memory; by default as made."""

    def attachments(self) -> list[Attachment]:
        """Return what the method itself lets ride on the run; none by default."""
        return []

    def before_step(self) -> None:
        """Act before an optimiser step."""

    def after_step(self) -> None:
        """Act after an optimiser step, such as moving a teacher; `step` still is the number of that step."""

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
        """Return what is looked at and shipped: the encoder, or what an attachment puts in its place."""
        model: Encoder = self.encoder
        for part in self.attached:
            model = cast(Encoder, part.view(self, model))
        return model

    def save_model(self, model: Encoder, path: Path, lineage: dict[str, Any]) -> None:
        """Write what is shipped, the `bundle_model`, to a folder."""
        from patchloom.models.bundle import save_bundle

        save_bundle(model, path, lineage=lineage, overwrite=True)

    # What binds it to Lightning.

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor | None:
        if not self.automatic_optimization:
            phased_step(self, batch)
            return None
        losses = self.checked(batch, self.training_loss)
        if self.repeating:
            return losses["loss"]
        if self.logs_now():
            self.record(losses | {"epoch": self.epochs(self.batches_done + 1)})
        self.batches_done += 1  # here, because callbacks hear of a batch's end before the module does
        return losses["loss"]

    def checked(self, batch: dict[str, Any], loss: Loss) -> dict[str, Tensor]:
        """Return what a loss makes of a batch.

        Raises:
            NonFiniteLossError: It is NaN or infinite.
        """
        self.last_batch_keys = list(batch["key"])
        losses = loss(batch)
        if not torch.isfinite(losses["loss"]):
            raise non_finite(self, losses)
        return losses

    def end_step(self) -> None:
        """Act after an optimiser step, and count it."""
        for part in self.attached:
            part.after_step(self)
        self.after_step()
        self.step += 1

    @contextmanager
    def further_passes(self) -> Iterator[None]:
        """Let forward passes go by that are not the step's own: they count and log nothing."""
        self.repeating = True
        try:
            yield
        finally:
            self.repeating = False

    # Where the run stands.

    @property
    def span(self) -> Span:
        """Where the present stage lies in the run."""
        return self.spans[self.stage] if self.spans else Span(0, self.total_steps, self.steps_per_epoch)

    def epochs(self, batches: int) -> float:
        """Return how many epochs so many batches of the run make, over all its stages."""
        done, passed = batches / self.config.accumulate, 0.0
        for span in self.spans or [self.span]:
            within = max(0.0, min(done - span.start, span.steps))
            passed += within / span.per_epoch
        return passed

    def at_step_end(self) -> bool:
        """Return whether no gradient is under way: the moment to save or to measure."""
        return self.batches_done % self.config.accumulate == 0

    def at_epoch_end(self) -> bool:
        """Return whether a pass over the images, or a stage, has just been completed."""
        within = self.step - self.span.start
        return self.at_step_end() and (within % self.span.per_epoch == 0 or self.step == self.span.end)

    def logs_now(self) -> bool:
        """Return whether the present step is one that is logged: every `log_every`-th, and the last."""
        return self.step % self.config.log_every == 0 or self.step == self.total_steps - 1

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
                logger.log_metrics(figures, step=self.step)

    def configure_optimizers(self) -> Any:
        """Return the optimiser or, of several phases, one for each."""
        phases = self.phases()
        if not phases:
            return self._adamw(lambda name: True)
        return [self._adamw(phase.trains) for phase in phases]

    def _adamw(self, wanted: Callable[[str], bool]) -> torch.optim.Optimizer:
        config = self.config
        groups = parameter_groups(
            self,
            layer_decay=config.layer_decay if isinstance(config, EncoderOptions) else 1.0,
            layer=self.layer,
            depth=depth(self.encoder),
            decay=self.decays,
            select=wanted,
        )
        return adamw(groups, betas=config.betas, eps=config.eps, fused=self.fused and config.precision != "16-mixed")

    def peak_lr(self) -> float:
        """Return the learning rate after the warm-up, scaled to the global batch where that is asked for."""
        config = self.config
        if config.lr_base_batch is None:
            return config.lr
        world = self.trainer.world_size if self._trainer is not None else 1
        return config.lr * (config.batch_size * config.accumulate * world / config.lr_base_batch)

    def least_lr(self) -> float:
        """Return the learning rate at the end of the cosine."""
        return self.config.min_lr

    def rates(self, step: int) -> tuple[float, float]:
        """Return the learning rate and weight decay of a step; each stage has the whole schedule."""
        config, span = self.config, self.span
        warmup = warmup_steps(config.warmup_epochs, span.per_epoch, span.steps)
        # A peak below min_lr is meant: the cosine must not climb.
        peak, within = self.peak_lr(), step - span.start
        lr = warmup_cosine(within, span.steps, warmup, peak, min(self.least_lr(), peak))
        end = config.weight_decay if config.weight_decay_end is None else config.weight_decay_end
        return lr, cosine(within, span.steps, config.weight_decay, end)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        lr, weight_decay = self.rates(self.step)
        set_rates(optimizer, lr, weight_decay)
        if self.logs_now():
            self.record({"lr": lr, "weight_decay": weight_decay})
        self.before_step()
        for part in self.attached:
            optimizer_closure = part.closure(self, optimizer_closure, optimizer)
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        optimizer.zero_grad()  # now, not before the next backward pass: the next forward pass then has their memory
        self.end_step()

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Clip the gradient of a phase; Lightning clips that of a single one itself."""
        if not self.automatic_optimization and self.config.clip_grad is not None:
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            nn.utils.clip_grad_norm_(parameters, self.config.clip_grad)

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

    def seed_draws(self, position: int) -> None:
        """Seed the draws inside the model (drop path, dropout) by a batch's place: a resumed run repeats them."""
        torch.manual_seed(hash((self.config.seed, position, self.global_rank)) & 0x7FFF_FFFF_FFFF_FFFF)

    def setup(self, stage: str) -> None:
        """Make what training needs in one process, load it in all, and attach what rides on the run."""
        run_dir = Path(self.config.out)
        if self.trainer.is_global_zero:
            self.prepare(self.source, run_dir)
        self.trainer.strategy.barrier("prepare")
        self.load_prepared(run_dir)
        for part in self.attached:
            part.attach(self)
        self.automatic_optimization = not self.phases()
        self.enter_stage(0)
        if self.config.compile:
            for part in self.encoder.blocks if has_tokens(self.encoder) else [self.encoder]:
                part.compile()

    def placement(self) -> dict[str, Any]:
        """Return which devices the run takes, in the trainer's words."""
        config = self.config
        return {"accelerator": config.accelerator, "devices": "auto" if config.devices == 0 else config.devices}

    def loader(self, stage: Stage) -> Any:
        """Return the batches of a stage, epoch by epoch: a `data.Loader`, or what has its attributes."""
        return stage_loader(self, stage)

    def train_dataloader(self) -> TrainingStream:
        """Return all batches of the run, from the present position on."""
        return open_stream(self)

    def begin_stage(self, number: int) -> None:
        """Go over to a stage after the first, within training: its modules, fresh optimisers."""
        strategy: Any = self.trainer.strategy
        if self.config.strategy == "fsdp":
            raise UsageError("several stages are not sharded by strategy=fsdp; use ddp")
        self.stage = number
        self.steps_per_epoch = self.span.per_epoch
        self.enter_stage(number)
        self.to(self.device)
        if isinstance(strategy, DDPStrategy):  # the processes must hear of parameters that are new
            strategy.model = self
            strategy.configure_ddp()
        strategy.setup_optimizers(self.trainer)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["batches_done"] = self.batches_done
        checkpoint["step"] = self.step
        checkpoint["stage"] = self.stage
        checkpoint["total_steps"] = self.total_steps
        checkpoint["seconds"] = self.seconds()
        checkpoint["lanes"] = self.lanes
        checkpoint["settings"] = plain_settings(self.config)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.batches_done = int(checkpoint["batches_done"])
        self.step = steps_done(checkpoint)
        for number in range(1, int(checkpoint.get("stage", 0)) + 1):
            self.enter_stage(number)
            self.stage = number
        self.seconds_before = float(checkpoint["seconds"])
        self.lanes = checkpoint.get("lanes")

    def seconds(self) -> float:
        """Return the time the run has taken so far, over all its starts."""
        return self.seconds_before + time.monotonic() - self.started

    def pixels(self, images: Tensor) -> Tensor:
        """Return a batch of uint8 images as floats in [0, 1] (floats are taken as they are)."""
        return unit(images)

    def describe(self) -> dict[str, Any]:
        """Return what the log and the report say about the model."""
        return {
            "encoder": self.config.encoder,
            "width": embed_dim(self.encoder),
            "depth": depth(self.encoder),
            "parameters": sum(p.numel() for p in self.encoder.parameters()),
            "trained_parameters": sum(p.numel() for p in self.parameters() if p.requires_grad),
        }
