"""What every way to train a whole classifier shares: augmentation, mixed images, an encoder with a fresh head.

Fine-tuning, training from scratch and distillation derive their settings from `SupervisedConfig` and themselves from
`SupervisedMethod`.
"""

from __future__ import annotations

import warnings
from typing import Any, ClassVar

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn

from patchloom.data.base import Source, StreamSource
from patchloom.data.survey import notice
from patchloom.data.transforms import make_mixup
from patchloom.encoders import Encoder, create_encoder, depth, family_of, has_tokens, input_size
from patchloom.encoders.patches import Grid
from patchloom.training.attachment import Attachment
from patchloom.training.config import TrainConfig
from patchloom.training.labelled import LabelledMethod
from patchloom.training.method import Transform
from patchloom.training.optim import make_optimizer, parameter_groups
from patchloom.training.sam import SharpnessAware
from patchloom.training.schedule import warmup_drops, warmup_steps
from patchloom.training.supervised_config import AugmentationConfig, PooledHeadOptions, SupervisedConfig


class SupervisedMethod(LabelledMethod):
    """Training of a whole classifier; by itself against the labels.

    Attributes:
        mix: Mixes the images of a batch and their labels, or None.
    """

    any_backbone = True
    normalises = True
    config_class: ClassVar[type[TrainConfig]] = SupervisedConfig
    config: SupervisedConfig

    def __init__(self, config: SupervisedConfig, source: Source | StreamSource) -> None:
        super().__init__(config, source)
        mixed = config.mixup > 0 or config.cutmix > 0
        if mixed and self.targets.kind == "multi":
            warnings.warn(
                "mixup and cutmix mix classes; they are left out, as images have several labels", stacklevel=2
            )
            mixed = False
        self.mix = (
            make_mixup(
                len(self.class_names),
                mixup=config.mixup,
                cutmix=config.cutmix,
                switch_prob=config.switch_prob,
                label_smoothing=config.label_smoothing,
            )
            if mixed
            else None
        )

    def build_encoder(self) -> Encoder:
        """Return the encoder with a fresh classifier."""
        encoder = super().build_encoder()
        config = self.config
        pool = config.pool if isinstance(config, PooledHeadOptions) else "cls"
        model = as_classifier(encoder, len(self.class_names), pool, config.init_scale, config.drop_path)
        model.pretrained_cfg = {**encoder.pretrained_cfg, "label_names": self.class_names}  # timm's own place for them
        return model

    def transform(self) -> Transform:
        """Return timm's augmentation for training classifiers; its images are normalised for the encoder."""
        return classifier_augmentation(self.config, self.encoder, self.sample_size, self.source)

    def repeats(self) -> int:
        """Return how often an image comes in a row."""
        return self.config.repeated_augmentation

    def mixed(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Return the batch's images, normalised, and labels, mixed where mixing is on.

        Returns:
            (B, C, *sides), and (B,) int64 classes, (B, classes) shares after mixing, or (B, L) labels.
        """
        images, labels = self.samples(batch), batch["label"]
        if self.mix is not None:
            generator = torch.Generator().manual_seed(torch.initial_seed())
            planes = images.flatten(1, -3)  # frames and slices are mixed like channels, all alike
            planes, labels = self.mix(planes, labels, generator)
            images = planes.view(images.shape)
        return images, labels

    def training_loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return the cross-entropy against mixed, smoothed labels."""
        images, labels = self.mixed(batch)
        return {"loss": self.targets.loss(self.encoder(images), labels)}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        config = self.config
        groups = parameter_groups(
            self,
            layer_decay=config.layer_decay,
            layer=self.layer,
            depth=depth(self.encoder),
            decay=self.decays,
        )
        return make_optimizer(
            config.optimizer,
            groups,
            betas=config.betas,
            eps=config.eps,
            momentum=config.momentum,
            fused=config.precision != "16-mixed",
        )

    def attachments(self) -> list[Attachment]:
        """Return sharpness-aware minimisation, where it has a radius."""
        return [SharpnessAware(self.sharpness)] if self.config.sam_rho or self.config.sam_rho_late else []

    def sharpness(self) -> float:
        """Return ρ of the present step."""
        late = self.config.sam_rho_late
        return self.config.sam_rho if late is None or not self.late() else late

    def rates(self, step: int) -> tuple[float, float]:
        """Return the learning rate and weight decay of an optimiser step."""
        config = self.config
        lr, weight_decay = super().rates(step)
        if config.lr_drops:
            warmup = warmup_steps(config.warmup_epochs, self.steps_per_epoch, self.total_steps)
            lr = warmup_drops(step, self.total_steps, warmup, self.peak_lr(), config.lr_drops, config.lr_drop)
        return lr, weight_decay


def classifier_augmentation(
    config: AugmentationConfig, encoder: Encoder, size: Grid, source: Source | StreamSource
) -> Transform:
    """Return timm's augmentation for training classifiers; says what of it deep images go without.

    Args:
        config: Settings.
        encoder: Images are normalised for it.
        size: Height and width; of clips and volumes all sides.
        source: The images.
    """
    pretrained = encoder.pretrained_cfg
    if config.auto_augment and source.kind.grey_levels is not None:
        notice(f"{config.data}: RandAugment is for pictures; {source.kind.plural} change by {source.kind.grey_levels}")
    elif config.auto_augment and (config.in_chans != 3 or source.values.known):
        colour = "" if config.in_chans == 3 else ", and changes of colour"
        notice(
            f"images of {config.data} are deep or of other than 3 channels: RandAugment leaves out what is defined "
            f"by 8-bit grey levels (equalise, posterise, SolarizeAdd){colour}"
        )
    return source.kind.classifier_view(
        size,
        mean=pretrained["mean"],
        std=pretrained["std"],
        scale=config.crop_scale,
        flip=config.flip,
        auto_augment=config.auto_augment,
        color_jitter=config.color_jitter,
        erasing=config.erasing,
        padding=config.crop_padding,
    )


def as_classifier(
    encoder: Encoder, num_classes: int, pool: str = "avg", init_scale: float = 0.001, drop_path: float = 0.0
) -> Encoder:
    """Return a classifier with the encoder's weights; a model that is no ViT keeps its own pooling.

    A `Beit` whose blocks share one relative-position table gets a table per block, each a copy; with mean pooling
    the final norm gives way to a fresh `fc_norm` over the pooled feature (as in BEiT's published fine-tuning).

    Args:
        encoder: Made by `create_encoder` or `create_backbone` (it remembers what it was made from).
        num_classes: Outputs of the classifier.
        pool: `avg` or `cls`, for a ViT; the two heads of a distilled DeiT read their own tokens.
        init_scale: Factor on the classifier's initial weights.
        drop_path: Stochastic depth rate of the last block, for a ViT; another model keeps what it was made with.
    """
    if not has_tokens(encoder):
        encoder.reset_classifier(num_classes)
        _draw_head(encoder.get_classifier(), init_scale)
        return encoder
    creation_args = encoder.patchloom_args
    model_args = {
        name: value for name, value in creation_args["model_args"].items() if name not in ("num_classes", "global_pool")
    }
    family = family_of(encoder)
    model_args |= family.classifier_arguments(encoder, pool == "avg")
    for name in family.size_arguments(input_size(encoder)):
        model_args.pop(name, None)
    channels = model_args.pop("in_chans", 3)
    model = create_encoder(
        creation_args["architecture"],
        image_size=input_size(encoder),
        in_chans=channels,
        drop_path=drop_path,
        **model_args,
    )
    state = family.classifier_state(encoder, dict(encoder.state_dict()))
    state_dict = model.state_dict()
    model.load_state_dict({name: value for name, value in state.items() if name in state_dict}, strict=False)
    model.reset_classifier(num_classes)
    made_args = {**model.patchloom_args["model_args"], "num_classes": num_classes}
    model.patchloom_args = {**model.patchloom_args, "model_args": made_args}
    for head in (model.head, getattr(model, "head_dist", None)):
        _draw_head(head, init_scale)
    return model


def _draw_head(head: nn.Module | None, scale: float) -> None:
    """Give a linear classifier its initial weights; others have drawn their own."""
    if isinstance(head, nn.Linear):
        trunc_normal_(head.weight, std=0.02)
        nn.init.zeros_(head.bias)
        with torch.no_grad():
            head.weight.mul_(scale)
