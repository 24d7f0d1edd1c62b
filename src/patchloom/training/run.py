"""One training run, from settings to a folder with a model and a report.

>>> run = train("pretrain", "ccvit", {"data": "photos", "out": "runs/photos"})  # doctest: +SKIP
>>> run.summary["knn_accuracy"]  # doctest: +SKIP
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as lp
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

from patchloom import registry
from patchloom.base import stopping
from patchloom.data.base import Source, StreamSource, no_labels
from patchloom.data.kinds import require_kind
from patchloom.encoders import require_tokens
from patchloom.errors import UsageError
from patchloom.io import check_place, make_folder, read_config
from patchloom.training.attachment import Attachment
from patchloom.training.callbacks import (
    ContinuedMetrics,
    FailureNote,
    Interruption,
    Probe,
    ProbeData,
    Progress,
    SignalsLeftToUs,
    SkippedImages,
)
from patchloom.training.checkpoint import AtomicCheckpointIO, CheckpointEvery
from patchloom.training.config import AUTO, Auto, TrainConfig, config_from_mapping, refuse_changes, write_config
from patchloom.training.ema import MovingAverage
from patchloom.training.experts import ExpertsAveraging
from patchloom.training.finish import Finish
from patchloom.training.hardware import quiet
from patchloom.training.health import CollapseWatch
from patchloom.training.method import Method
from patchloom.training.metrics import CSVMetrics
from patchloom.training.options import AdversaryOptions, AverageOptions, ExpertOptions, start_of
from patchloom.training.places import PLACES, relocated
from patchloom.training.probe_data import choose_probe_data
from patchloom.training.saved import CHECKPOINTS, LAST, is_complete, saved_settings, usable_checkpoint
from patchloom.training.size import Advice, fit_to_data
from patchloom.training.trial import memory_advice, settle


@dataclass(frozen=True)
class Run:
    """What a training command leaves behind."""

    path: Path
    """Run folder."""
    model: Path
    """Bundle of the trained encoder."""
    report: Path
    """HTML report, unless `report=False`."""
    summary: dict[str, Any] = field(repr=False)
    """The contents of `summary.json`."""

    def __str__(self) -> str:
        report = f", report {self.report}" if self.report.exists() else ""
        state = "interrupted (go on with --resume)" if self.summary.get("interrupted") else "done"
        return f"{state}: model {self.model}{report}"


def train(verb: str, method: str, settings: Mapping[str, Any], go_on: str | None = "--resume") -> Run:
    """Train by a method of a verb, as `patchloom VERB METHOD` does; see `resolve` and `fit` for what is raised."""
    method_class = registry.method_class(verb, method)
    command = f"{verb} {method}"
    return fit(command, method_class, resolve(command, method_class, settings), given=settings, go_on=go_on)


def resolve(command: str, method_class: type[Method], settings: Mapping[str, Any]) -> TrainConfig:
    """Return the settings of a run; one that is resumed needs only `out`, the rest is read from its folder.

    Raises:
        UsageError: Unknown, missing or impossible settings, or a run of another method.
    """
    values = dict(settings)
    saved = Path(str(values.get("out", ""))) / "config.yaml"
    if values.get("resume") and values.get("out") and saved.exists():
        before = saved_settings(saved.parent, command)
        # What auto settled when the run began stays.
        values = before | {k: v for k, v in values.items() if not (k in AUTO and v == "auto")}
        for name in PLACES & values.keys():
            if values[name] is not None and values[name] == before.get(name) and name != "out":
                values[name] = relocated(name, before, saved.parent)
    return config_from_mapping(method_class.config_class, values)


def fit(
    command: str,
    method_class: type[Method],
    config: TrainConfig,
    *,
    source: Source | StreamSource | None = None,
    attach: Sequence[Attachment] = (),
    given: Collection[str] | None = None,
    go_on: str | None = "--resume",
) -> Run:
    """Train, and leave a run folder behind: settings, metrics, checkpoints, model, report.

    Args:
        command: The words that name the method on the command line, such as `pretrain ccvit`.
        method_class: The method.
        config: Its settings.
        source: What `config.data` names, where it is open already or no source that a name opens.
        attach: What rides on the run besides what the settings ask for.
        given: Names of the settings that were chosen; others are made to fit the number of images. Default: all.
        go_on: What goes on with the run once it is stopped, as it is then said; None where nothing can.

    Raises:
        UsageError: The data, the encoder or the run folder cannot be used as asked.
        NonFiniteLossError: The loss is NaN or infinite; the last checkpoint is from before.
        CheckpointWriteError: The disk refused a checkpoint; the one before is intact.
        Stopped: A signal ended the run; from its first step on, checkpoint, model and report are written.
    """
    with stopping.stoppable():
        return _fit(command, method_class, config, source, attach, given, go_on)


def _fit(
    command: str,
    method_class: type[Method],
    config: TrainConfig,
    source: Source | StreamSource | None,
    attach: Sequence[Attachment],
    given: Collection[str] | None,
    go_on: str | None,
) -> Run:
    if source is None:
        source, config = method_class.open_data(config)
    require_kind(source, method_class.kinds, command)
    if method_class.needs_labels and source.class_names is None:
        raise no_labels(source, f"{command} needs labels and ")
    if not (config.resume and (Path(config.out) / "config.yaml").exists()):
        if isinstance(config.batch_size, Auto):
            config = _settled(config, method_class, source)
        if given is not None:
            config = fit_to_data(config, method_class.images_to_learn_from(config, source), given)
        config = _settled(config, method_class, source)  # workers alone, for the batch there is
    method = method_class(config, source)
    method.attached = [*method.attachments(), *attachments_of(config), *attach]
    run_dir = check_place(config.out)
    is_new = not run_dir.exists()
    if is_first_process():
        _claim(run_dir, config)
        write_config(config, run_dir / "config.yaml", command)
    checkpoint = usable_checkpoint(run_dir) if config.resume else None
    if checkpoint is not None and is_complete(checkpoint, run_dir):
        print(f"the run in {run_dir} is complete; nothing to resume", file=sys.stderr)
        return read_run(run_dir)
    with quiet():
        try:
            trainer = _trainer(method, method.source, run_dir, command)
            if is_first_process():
                _announce(method, method.source, trainer)
            callbacks: list[Any] = cast(Any, trainer).callbacks
            interruption = next(c for c in callbacks if isinstance(c, Interruption))
            _tell_of_signals(trainer)
            with stopping.through_lightning(), memory_advice(config):
                trainer.fit(method, ckpt_path=None if checkpoint is None else str(checkpoint))
        except stopping.Stopped:
            last = run_dir / CHECKPOINTS / LAST
            begun = f"{last} is where" if last.exists() else "no step was saved; that is how"
            print(f"stopped at once; {begun} {go_on} goes on" if go_on else "stopped at once", file=sys.stderr)
            raise
        except UsageError:
            # Nothing was done; the corrected command may use the name.
            if is_new and not (run_dir / CHECKPOINTS / LAST).exists():
                shutil.rmtree(run_dir, ignore_errors=True)
            raise
        finally:
            stopping.release()
    number = stopping.received() or interruption.number
    if not trainer.is_global_zero:
        if number and not stopping.is_helper():  # the first process of another machine
            raise stopping.Stopped(number)
        return Run(run_dir, run_dir / "model", run_dir / "report.html", {})
    run = read_run(run_dir)
    if run.summary.get("interrupted"):
        how = f"; go on with {go_on}" if go_on else ""
        print(f"stopped at step {run.summary['steps']}{how}", file=sys.stderr)
        raise stopping.Stopped(number or signal.Signals[run.summary["stopped_by"]])
    if number:
        print(run, file=sys.stderr)
        raise stopping.Stopped(number)
    return run


def _settled(config: TrainConfig, method_class: type[Method], source: Source | StreamSource) -> TrainConfig:
    """Return the settings with numbers in place of `auto`; processes that the first one started take its own."""
    undecided = [name for name in AUTO if isinstance(getattr(config, name), Auto)]
    if undecided and not is_first_process() and (Path(config.out) / "config.yaml").exists():
        written = read_config(Path(config.out) / "config.yaml")
        settled: dict[str, Any] = {name: int(written[name]) for name in undecided}
        return dataclasses.replace(config, **settled)
    return settle(config, method_class, source, _precision(config)) if undecided else config


def _tell_of_signals(trainer: lp.Trainer) -> None:
    """Let no signal be lost between the start of other processes and the moment they listen."""
    launcher = trainer.strategy.launcher
    if isinstance(launcher, _SubprocessScriptLauncher):
        stopping.hold()
    elif launcher is not None:  # spawned processes, which hear of a signal from this one
        stopping.defer("stopping after this step", launcher.kill)


def attachments_of(config: TrainConfig) -> list[Attachment]:
    """Return what the settings of every method can let ride on a run, in the order in which they act."""
    found: list[Attachment] = []
    if isinstance(config, ExpertOptions) and config.experts:
        trained = start_of(config) is not None or Path(config.encoder).exists()
        found.append(ExpertsAveraging(config, trained=trained))
    if isinstance(config, AverageOptions) and config.ema is not None:
        found.append(MovingAverage(config.ema))
    if isinstance(config, AdversaryOptions) and config.adversary != "none":
        # By its place: a system stands above the engine, which knows none.
        found.append(registry.load("systems.dta.adversarial:AdversarialTraining").of(config))
    return found


def read_run(path: str | Path) -> Run:
    """Return the run in a folder.

    Raises:
        UsageError: The folder holds no finished run, or its summary is damaged.
    """
    run_dir = Path(path)
    summary = run_dir / "summary.json"
    if not summary.exists():
        raise UsageError(f"{run_dir} holds no finished run (there is no summary.json)")
    try:
        figures = json.loads(summary.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{summary} is damaged ({error}); resume writes it anew") from error
    return Run(run_dir, run_dir / "model", run_dir / "report.html", figures)


def _trainer(method: Method, source: Source | StreamSource, run_dir: Path, command: str) -> lp.Trainer:
    config = method.config
    metrics = CSVMetrics(run_dir / "metrics.csv")
    if not config.resume:
        metrics.rows.clear()
    probe = Probe(
        run_dir,
        choose_probe_data(source, config, method.encoder) if method.probed else ProbeData(None, None),
        every=config.probe_every,
        batch_size=config.batch_size,
    )
    queries = probe.data.queries
    skipped = SkippedImages(run_dir)
    advice = Advice()
    interruption = Interruption()
    callbacks = [
        *method.attached,
        interruption,
        ContinuedMetrics(metrics),
        skipped,
        probe,
        *([] if queries is None else [CollapseWatch(queries, config.health_every, config.batch_size)]),
        Progress(),
        FailureNote(run_dir),
        CheckpointEvery(run_dir / "checkpoints", config.checkpoint_every),
        advice,
        Finish(run_dir, command, probe, skipped, interruption, advice),
    ]
    trainer = lp.Trainer(
        default_root_dir=run_dir,
        **method.placement(),
        num_nodes=config.nodes,
        strategy=_strategy(method),
        precision=_precision(config),
        max_epochs=1,  # one pass over all batches of the run, see TrainingStream
        accumulate_grad_batches=config.accumulate,
        callbacks=callbacks,
        logger=[metrics, TensorBoardLogger(run_dir, name="", version="tensorboard")],
        plugins=[AtomicCheckpointIO()],
        limit_val_batches=0,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer._signal_connector = SignalsLeftToUs(trainer)
    return trainer


def _strategy(method: Method) -> Any:
    config = method.config
    if config.strategy == "fsdp":
        from lightning.pytorch.strategies import FSDPStrategy

        if method.phases():
            raise UsageError("a method of several optimisers is not sharded by strategy=fsdp; use ddp")
        require_tokens(method.encoder)
        block = type(method.encoder.blocks[0])
        return FSDPStrategy(auto_wrap_policy={block}, state_dict_type="full", use_orig_params=True)
    if method.phases() and (config.devices != 1 or config.nodes > 1):  # a phase leaves the others' parameters alone
        launched = "ddp" if config.strategy == "auto" else config.strategy
        return f"{launched}_find_unused_parameters_true"
    return config.strategy


def _precision(config: TrainConfig) -> Any:
    if config.precision != "auto":
        return config.precision
    on_gpu = config.accelerator in ("auto", "gpu") and torch.cuda.is_available()
    return "bf16-mixed" if on_gpu and torch.cuda.is_bf16_supported() else "32-true"


def precision_hint(config: TrainConfig, device: str) -> str | None:
    """Return what to say of arithmetic that nobody chose; None where it is the fastest there is.

    Args:
        config: The settings.
        device: Kind of device, as Lightning's accelerators are called: CPU, CUDA.
    """
    able = torch.cpu.get_capabilities()  # other processors only emulate bfloat16
    if config.precision == "auto" and device == "CPU" and (able.get("amx_bf16") or able.get("avx512_bf16")):
        return "this processor computes in bfloat16: --precision bf16-mixed takes about a third less time"
    return None


def _claim(run_dir: Path, config: TrainConfig) -> None:
    """Take the run folder, or say why not."""
    if run_dir.exists() and not run_dir.is_dir():
        raise UsageError(f"the run folder {run_dir} is a file; choose another out")
    holds_run = (run_dir / "config.yaml").exists()
    if run_dir.exists() and any(run_dir.iterdir()):
        if config.overwrite and not holds_run:
            raise UsageError(
                f"{run_dir} is not empty and holds no run, so overwrite will not delete it; clear it first"
            )
        if config.overwrite:
            shutil.rmtree(run_dir)
        elif not (config.resume and holds_run):
            raise UsageError(
                f"the run folder {run_dir} is not empty; resume goes on with it, overwrite deletes it, "
                f"or choose another out"
            )
    if holds_run and config.resume:
        refuse_changes(read_config(run_dir / "config.yaml"), config)
    make_folder(run_dir)


def is_first_process() -> bool:
    """Return whether this is the process that speaks for all, before the trainer knows."""
    names = ("RANK", "SLURM_PROCID", "LOCAL_RANK", "NODE_RANK")
    return all(os.environ.get(name, "0") == "0" for name in names)


def _announce(method: Method, source: Source | StreamSource, trainer: lp.Trainer) -> None:
    config = method.config
    about = method.describe()
    count = source.describe()["images"]
    samples = source.kind.plural
    images = f"{count:,} {samples}" if isinstance(count, int) else f"a stream of {samples}"
    length = f"{config.max_steps} steps" if config.max_steps else f"{config.epochs} epochs"
    kind = type(trainer.accelerator).__name__.removesuffix("Accelerator")
    print(
        f"{about['encoder']}: {about['parameters'] / 1e6:.1f} M parameters, {images} of {config.data}, {length}, "
        f"precision {_precision(config)}, {trainer.num_devices * trainer.num_nodes} × {kind}",
        file=sys.stderr,
    )
    if hint := precision_hint(config, kind):
        print(hint, file=sys.stderr)
