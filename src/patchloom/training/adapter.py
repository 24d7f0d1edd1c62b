"""What every way to train an adapter shares: a frozen encoder, an insertion, a small file at the end."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import timm
import torch
from torch import Tensor, nn

from patchloom.data.base import Source, StreamSource
from patchloom.encoders import Encoder, create_encoder, depth, normalize, set_image_size
from patchloom.encoders.insertion import Insertion, insert, insertions
from patchloom.errors import UsageError
from patchloom.models.bundle import fetch_encoder
from patchloom.models.start import start_encoder
from patchloom.training.adapter_config import AdapterConfig
from patchloom.training.inputs import read_as
from patchloom.training.labelled import LabelledMethod
from patchloom.training.lars import Lars
from patchloom.training.method import Transform
from patchloom.training.optim import make_optimizer, parameter_groups
from patchloom.training.options import ViewOptions

if TYPE_CHECKING:
    from patchloom.report import Section

NAME = "adapter"


class AdapterMethod(LabelledMethod):
    """Trains an insertion beside a frozen encoder; subclasses make the insertion.

    Attributes:
        base: Hash of the encoder before anything was added.
    """

    kinds: ClassVar[tuple[str, ...]] = ("image", "clip", "volume")
    config: AdapterConfig

    def __init__(self, config: AdapterConfig, source: Source | StreamSource) -> None:
        super().__init__(config, source)
        # The frozen encoder is read from its bundle again, so checkpoints hold what trains and nothing else.
        self.strict_loading = False

    @abstractmethod
    def make_insertion(self, encoder: Encoder, num_classes: int) -> Insertion:
        """Return what is added to the encoder, with a head for `num_classes`."""

    def build_encoder(self) -> Encoder:
        """Return the encoder with the insertion in it.

        Raises:
            UsageError: An encoder without trained weights, or one that nothing can be inserted into.
        """
        from patchloom.models.adapters import encoder_hash, load_into

        config = self.config
        encoder = self._trained_encoder()
        self.base = encoder_hash(encoder)
        if config.image_size is not None:
            set_image_size(encoder, config.image_size)
        read_as(encoder, config)
        insertion = self.make_insertion(encoder, len(self.class_names))
        if insertion.trainable_parameters() == 0:
            raise UsageError(f"{type(insertion).__name__} has no trainable parameters; give it something to train")
        if config.init_adapter is not None:
            load_into(insertion, config.init_adapter, base=self.base, classes=len(self.class_names))
        insert(encoder, insertion, NAME)
        return encoder

    @property
    def insertion(self) -> Insertion:
        """What trains."""
        return insertions(self.encoder)[NAME]

    def _trained_encoder(self) -> Encoder:
        """Return the encoder at the size it was made for: it is known by its weights, and positions are among them."""
        from patchloom.models.adapters import find_adapter

        config, name = self.config, self.config.encoder
        if Path(name).exists():
            if find_adapter(name) is not None:
                raise UsageError(f"{name} holds an adapter; give the encoder it extends, or set init_adapter={name}")
            return start_encoder(name, in_chans=config.in_chans, drop_path=config.drop_path)
        if timm.is_model(name) and not timm.models.is_model_pretrained(name):
            raise UsageError(
                f"{name} has no published weights, and there is nothing to adapt in fresh ones; give the path of a "
                f"bundle or run"
            )
        return fetch_encoder(name, create_encoder, in_chans=config.in_chans, drop_path=config.drop_path)

    def transform(self) -> Transform:
        """Return random crops and flips; a method without these settings has a transform of its own."""
        config = self.config
        assert isinstance(config, ViewOptions)
        return self.source.kind.training_view(
            self.sample_size,
            scale=config.crop_scale,
            flip=config.flip,
            color_jitter=config.color_jitter,
        )

    def training_loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return the loss of a batch."""
        images = normalize(self.pixels(self.samples(batch)), self.encoder)
        return {"loss": self.targets.loss(self.encoder(images), batch["label"])}

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        """Return whether weight decay applies: to all that trains, as published."""
        return True

    def configure_optimizers(self) -> torch.optim.Optimizer:
        config = self.config
        if config.optimizer == "adamw":
            return super().configure_optimizers()
        groups = parameter_groups(self, depth=depth(self.encoder), decay=self.decays)
        if config.optimizer == "lars":
            return Lars(groups, momentum=config.momentum)
        return make_optimizer("sgd", groups, betas=config.betas, eps=config.eps, momentum=config.momentum)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the tensors of a checkpoint: what the insertion stores."""
        return {f"encoder.adapters.{NAME}.{name}": value for name, value in self.insertion.stored_state().items()}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["base"] = self.base

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if checkpoint["base"] != self.base:
            raise UsageError(
                f"the run in {self.config.out} adapts the encoder {checkpoint['base']}, and {self.config.encoder} now "
                f"holds {self.base}; put the first one back, or start a new run"
            )

    def save_model(self, model: Encoder, path: Path, lineage: dict[str, Any]) -> None:
        """Write the adapter, which names the encoder it extends."""
        from patchloom.models.adapters import save_adapter

        save_adapter(
            model,
            path,
            name=NAME,
            base=self.base,
            encoder_path=self.config.encoder,
            class_names=self.class_names,
            lineage=lineage,
            overwrite=True,
        )

    def describe(self) -> dict[str, Any]:
        """Return what the log and the report say: the encoder's parameters, and those that train."""
        about = super().describe()
        encoder_parameters = sum(
            p.numel() for name, p in self.encoder.named_parameters() if not name.startswith("adapters.")
        )
        trained = self.insertion.trainable_parameters()
        return {**about, "parameters": encoder_parameters, "trained_parameters": trained}

    def summary(self) -> dict[str, Any]:
        """Return what the run learnt from, and what the adapter costs to store."""
        stored = self.insertion.stored_state()
        size = sum(value.numel() * value.element_size() for value in stored.values())
        head = self.insertion.head
        in_head = 0 if head is None else sum(p.numel() for p in head.parameters())
        return {
            **super().summary(),
            "encoder_hash": self.base,
            "adapter_bytes": size,
            "head_parameters": in_head,
        }

    def report_sections(self, images: Tensor) -> list[Section]:
        """Return what was added, and the figures of each class."""
        from patchloom.report import Section

        about, more = self.describe(), self.summary()
        share = about["trained_parameters"] / about["parameters"]
        text = (
            f"{about['trained_parameters']:,} parameters train beside {about['parameters']:,} frozen ones "
            f"({share:.2%}); {more['adapter_bytes'] / 1e6:.2f} MB are stored for this task."
        )
        return [Section(title="Adapter", text=text), *super().report_sections(images)]
