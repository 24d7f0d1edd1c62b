"""What is evaluated, and on what: the settings every evaluation shares, and the features it starts from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from patchloom.base.sizes import Size
from patchloom.data import open_alike
from patchloom.data.base import Source, StreamSource, no_labels
from patchloom.data.subset import say_unlabelled
from patchloom.data.survey import notice
from patchloom.encoders import Encoder, create_backbone, has_tokens, in_chans, input_size, size_arguments
from patchloom.errors import UsageError
from patchloom.evaluate.config import EvaluationConfig, is_pixels
from patchloom.features.cache import cached_features
from patchloom.features.extract import NO_LABEL, Features, Pool
from patchloom.features.fingerprint import source_hash
from patchloom.features.inputs import require_taken
from patchloom.models.bundle import made_from, open_encoder


def resolve_encoder(config: EvaluationConfig) -> Encoder | None:
    """Return the encoder meant, or None for raw pixels.

    Raises:
        UsageError: There is no such encoder, or it has no trained weights and `untrained` is not set.
    """
    if is_pixels(config.encoder):
        return None
    if not config.untrained:
        return open_encoder(config.encoder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        if not isinstance(config.encoder, nn.Module) and not Path(str(config.encoder)).exists():
            return create_backbone(str(config.encoder), image_size=config.image_size)
        return _fresh(open_encoder(config.encoder), config.image_size)


def labelled_features(
    config: EvaluationConfig,
    *,
    several: bool = False,
    may_be_same: bool = False,
    layers: Sequence[int] | None = None,
    pool: Pool | None = None,
) -> tuple[Features, Features, list[str]]:
    """Return training features, test features and the names of the classes; images without label are left out.

    Args:
        config: What is evaluated, and on what.
        several: Images have several labels each: `Features.labels` is (n, L), NaN where unknown, in both.
        may_be_same: Test images may be the training images; the two features are then the same object.
        layers: Blocks whose output is taken, see `features.extract`.
        pool: Instead of the pooling of the settings.

    Raises:
        UsageError: A source without labels, or with labels of the other kind; a test class that training does not
            know; the same images twice; features that are not finite.
    """
    encoder = resolve_encoder(config)
    channels = 3 if encoder is None else in_chans(encoder)
    options = config.source_options()
    train, test = open_alike((config.train, config.test), in_chans=channels, seed=config.seed, model=encoder, **options)
    for source in (train, test):
        require_taken(source, encoder)
        _check_labels(source, several)
    same = source_hash(train) == source_hash(test)
    if not may_be_same and train.fingerprint() == test.fingerprint():
        raise UsageError(
            f"train {config.train} and test {config.test} are the same images; measure on images apart from them"
        )
    numbers = _common_classes(train, test)
    learnt = _labelled(config, encoder, train, layers, pool)
    measured = learnt if same else _labelled(config, encoder, test, layers, pool)
    if numbers is not None and not same:
        measured = measured._replace(labels=_renumbered(measured.labels, numbers, len(train.class_names or [])))
    if several:
        names = train.class_names or [str(number) for number in range(learnt.labels.shape[1])]
        return learnt, measured, list(names)
    highest = int(torch.cat([learnt.labels, measured.labels]).max())
    class_names = train.class_names or test.class_names or [str(number) for number in range(highest + 1)]
    return learnt, measured, list(class_names)


def encoder_name(config: EvaluationConfig) -> str | None:
    """Return what the user calls the encoder, with its whole path; None for a module."""
    if isinstance(config.encoder, nn.Module):
        return None
    name = str(config.encoder)
    name = str(Path(name).resolve()) if Path(name).exists() else name
    return f"{name}, untrained, seed {config.seed}" if config.untrained else name


def _fresh(trained: Encoder, image_size: Size | None) -> Encoder:
    """Return an encoder like another, with new weights."""
    creation_args = made_from(trained)
    arguments = dict(creation_args["model_args"])
    arguments.pop("img_size", None)
    for name in size_arguments(trained) if has_tokens(trained) else ():
        arguments.pop(name, None)
    size: Any = image_size or input_size(trained)
    channels = arguments.pop("in_chans")
    fresh = create_backbone(creation_args["architecture"], image_size=size, in_chans=channels, **arguments)
    fresh.pretrained_cfg = {**trained.pretrained_cfg, "input_size": fresh.pretrained_cfg["input_size"]}
    return fresh


def _common_classes(train: Source | StreamSource, test: Source | StreamSource) -> torch.Tensor | None:
    """Return the number among the training classes of each test class, or None where numbers are all there is."""
    if train.class_names is None or test.class_names is None:
        return None
    numbers = {name: number for number, name in enumerate(train.class_names)}
    unknown = [name for name in test.class_names if name not in numbers]
    if unknown and _are_numbers(train.class_names) != _are_numbers(test.class_names):
        # Shards may say the number of a class and not its name.
        unnamed, named = (train, test) if _are_numbers(train.class_names) else (test, train)
        notice(f"{unnamed.name} has numbers of classes, and they are taken as those of {named.name} in their order")
        return None
    if unknown:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        raise UsageError(
            f"{test.name} has classes that {train.name} does not have: {', '.join(unknown[:3])}{more}; "
            f"name the folders of both alike"
        )
    return torch.tensor([numbers[name] for name in test.class_names])


def _are_numbers(names: Sequence[str]) -> bool:
    return list(names) == [str(number) for number in range(len(names))]


def _check_labels(source: Source | StreamSource, several: bool) -> None:
    # The labels of a stream come with its images; what they are called is known.
    if source.class_names is None if isinstance(source, StreamSource) else source.labels is None:
        raise no_labels(source)
    if source.multilabel and not several:
        raise UsageError(
            f"{source.name} has several labels per image and this evaluation compares classes; "
            f"patchloom evaluate multilabel measures the mean AUROC of labels"
        )
    if several and not source.multilabel:
        raise UsageError(
            f"{source.name} has one class per image and this evaluation is for several labels each; use linear or knn"
        )


def _renumbered(labels: torch.Tensor, numbers: torch.Tensor, classes: int) -> torch.Tensor:
    """Return test labels in the training classes' order; a label that the test images lack is unknown for them."""
    if labels.ndim == 1:
        return torch.where(labels >= 0, numbers[labels.clamp_min(0)], labels)
    ordered = torch.full((len(labels), classes), torch.nan)
    ordered[:, numbers] = labels.float()
    return ordered


def _labelled(
    config: EvaluationConfig,
    encoder: Encoder | None,
    source: Source | StreamSource,
    layers: Sequence[int] | None,
    pool: Pool | None,
) -> Features:
    """Return the features of the labelled images of a source."""
    features = cached_features(
        encoder,
        source,
        cache=config.cache,
        name=encoder_name(config),
        image_size=config.image_size,
        batch_size=config.batch_size,
        num_workers=config.num_workers,
        device=config.device,
        pool=config.pool if pool is None else pool,
        layers=layers,
        precision=config.precision,
        view=config.view,
    )
    _check_finite(features, source, config)
    known = features.labels >= 0 if features.labels.ndim == 1 else ~features.labels.isnan().all(1)
    if not bool(known.any()):
        raise UsageError(f"{source.name} has no labelled image")
    if bool(known.all()):
        return features
    labelled = list(zip(features.keys, known.tolist(), strict=True))
    left_out = [key for key, keep in labelled if not keep]
    say_unlabelled(source.name, left_out, len(labelled))
    skipped = [*features.skipped, *((key, NO_LABEL) for key in left_out)]
    return Features(features.vectors[known], features.labels[known], [key for key, keep in labelled if keep], skipped)


def _check_finite(features: Features, source: Source | StreamSource, config: EvaluationConfig) -> None:
    bad = torch.cat([~torch.isfinite(part).all(1) for part in features.vectors.split(2**14)])
    if not bool(bad.any()):
        return
    first = features.keys[int(bad.nonzero()[0])]
    remedy = "set precision to 32" if config.precision == "16" else "its weights are broken, or training has diverged"
    raise UsageError(
        f"{int(bad.sum())} of the {len(bad)} features of {source.name} hold NaN or infinity, the first those of "
        f"{first}; {remedy}"
    )
