"""The verbs of the command line as functions, with the same names and the same arguments.

They are plain functions: typed, documented, picklable. What they need is loaded when they are called, so importing this
module loads neither torch nor timm.

>>> import patchloom as pl
>>> run = pl.pretrain("ccvit", data="photos", out="runs/photos", encoder="ccvit_tiny_patch8_64", epochs=50)
... # doctest: +SKIP
>>> pl.evaluate("knn", encoder=run.model, train="photos", test="photos:test")["accuracy"]  # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

# A function has to win over the package of its name. Python makes a submodule an attribute of its package once, when it
# is first loaded; so these, which load nothing themselves, are loaded here, before `patchloom/__init__.py` takes over
# the functions.
import patchloom.attack
import patchloom.evaluate
import patchloom.explain
import patchloom.segment  # noqa: F401
from patchloom import registry
from patchloom.demo import demo
from patchloom.errors import unknown_name
from patchloom.features.embed import embed
from patchloom.models.export import export
from patchloom.models.merge import merge_to_bundle
from patchloom.systems.published import import_reference
from patchloom.tokenizers.commands import fit_codebook, show_codebook

if TYPE_CHECKING:
    from torch import nn

    from patchloom.attack.transfer import AttackRun
    from patchloom.explain.gallery import Gallery
    from patchloom.tokenizers.tokenizer import Tokenizer
    from patchloom.training.run import Run

__all__ = [
    "adapt",
    "align",
    "anomaly",
    "attack",
    "clean",
    "demo",
    "detect",
    "distill",
    "embed",
    "evaluate",
    "explain",
    "export",
    "fit_codebook",
    "generate",
    "import_reference",
    "list_methods",
    "list_references",
    "list_sources",
    "load",
    "load_reference",
    "load_tokenizer",
    "merge_to_bundle",
    "pretrain",
    "segment",
    "show_codebook",
    "train_tokenizer",
]


def pretrain(
    method: str,
    /,
    *,
    out: str | Path,
    data: str | Path | None = None,
    encoder: str | Path | None = None,
    **settings: Any,
) -> Run:
    """Train an encoder on unlabelled images.

    Args:
        method: Name of the method: ccvit, beit, dinov2, mae; `list_methods("pretrain")` has all.
        out: Run folder; empty or absent, unless `resume=True` goes on with the run in it or `overwrite=True`.
        data: Images: a folder, shards, photos, digits, torchvision:NAME, hf:NAME; `list_sources()` has all. May be left
            out where a run is resumed.
        encoder: Name of a timm model, or the bundle or run to start from; default: the method's.
        **settings: Further fields of the method's settings class; `patchloom pretrain METHOD --help` explains them.

    Returns:
        The run: its folder `path`, its `model` (a bundle), its `report` and its figures, `summary`.

    Raises:
        UsageError: Unknown method or setting, or a request that cannot be carried out.
        KeyboardInterrupt: The run was interrupted; its checkpoint, model and report are written.
    """
    from patchloom.training.run import train

    return train("pretrain", method, settings | _given(out=out, data=data, encoder=encoder))


def adapt(
    method: str,
    /,
    *,
    out: str | Path,
    data: str | Path | None = None,
    encoder: str | Path | None = None,
    **settings: Any,
) -> Run:
    """Train an encoder further on labelled images.

    Args:
        method: Name of the method: finetune, linear, lora, vpt, adaptformer …; `list_methods("adapt")` has all.
        out: Run folder; empty or absent, unless `resume=True` goes on with the run in it or `overwrite=True`.
        data: Labelled images: a folder with a folder per class, FILE.csv, shards, torchvision:NAME …
        encoder: Bundle, run, or name of a timm model; default: the method's.
        **settings: Further fields of the method's settings class; `patchloom adapt METHOD --help` explains them.

    Returns:
        The run: its folder `path`, its `model` (a bundle with its classifier, or an adapter), its `report`, `summary`.

    Raises:
        UsageError: Unknown method or setting, or a request that cannot be carried out.
        KeyboardInterrupt: The run was interrupted; its checkpoint, model and report are written.
    """
    from patchloom.training.run import train

    return train("adapt", method, settings | _given(out=out, data=data, encoder=encoder))


def align(
    method: str,
    /,
    *,
    out: str | Path,
    data: str | Path | None = None,
    encoder: str | Path | None = None,
    **settings: Any,
) -> Run:
    """Train an encoder to meet language, or what another sense gives.

    Args:
        method: Name of the method: clip; `list_methods("align")` has all.
        out: Run folder; empty or absent, unless `resume=True` goes on with the run in it or `overwrite=True`.
        data: Images with captions: a table with a column of captions, shards of .jpg and .txt, a folder with a.txt
            beside a.jpg; or labelled images, whose captions are made of the names of their classes.
        encoder: Name of a timm model, or the bundle or run to start from; default: the method's.
        **settings: Further fields of the method's settings class; `patchloom align METHOD --help` explains them.

    Returns:
        The run: its folder `path`, its `model` (a bundle of the encoder, with what else was trained inside), its
        `report` and its `summary`.

    Raises:
        UsageError: Unknown method or setting, or a request that cannot be carried out.
        KeyboardInterrupt: The run was interrupted; its checkpoint, model and report are written.
    """
    from patchloom.training.run import train

    return train("align", method, settings | _given(out=out, data=data, encoder=encoder))


def train_tokenizer(
    method: str,
    /,
    *,
    out: str | Path,
    data: str | Path | None = None,
    encoder: str | None = None,
    **settings: Any,
) -> Run:
    """Train a tokenizer on unlabelled images; `fit_codebook` makes one of centroids, without training.

    Args:
        method: Name of the method: vit_vqgan, vq_kd; `list_methods("tokenize train")` has all.
        out: Run folder; empty or absent, unless `resume=True` goes on with the run in it or `overwrite=True`.
        data: Images, as for `pretrain`.
        encoder: Size of the encoder, such as vit_vqgan_small, or of vq_kd ccvit_small_patch16_224; default: the
            method's.
        **settings: Further fields of the method's settings class; `patchloom tokenize train METHOD --help` has them.

    Returns:
        The run: its folder `path`, its `model` (which `load_tokenizer` opens), its `report` and its `summary`.

    Raises:
        UsageError: Unknown method or setting, or a request that cannot be carried out.
        KeyboardInterrupt: The run was interrupted; its checkpoint, model and report are written.
    """
    from patchloom.training.run import train

    return train("tokenize train", method, settings | _given(out=out, data=data, encoder=encoder))


def generate(
    method: str,
    /,
    *,
    out: str | Path,
    tokenizer: str | Path | None = None,
    data: str | Path | None = None,
    encoder: str | None = None,
    **settings: Any,
) -> Run:
    """Train a model that makes images.

    Args:
        method: Name of the method: vim; `list_methods("generate")` has all.
        out: Run folder; empty or absent, unless `resume=True` goes on with the run in it or `overwrite=True`.
        tokenizer: What makes tokens of images and images of tokens: a run of `train_tokenizer`, or a codebook. May be
            left out where a run is resumed, like data.
        data: Images, as for `pretrain`; with `conditional=True` labelled.
        encoder: Size of the model, such as vim_small; default: the method's.
        **settings: Further fields of the method's settings class; `patchloom generate METHOD --help` has them.

    Returns:
        The run: its folder `path`, its `model` (which `load` opens, and whose `sample` draws images), its `report` and
        its `summary`.

    Raises:
        UsageError: Unknown method or setting, or a request that cannot be carried out.
        KeyboardInterrupt: The run was interrupted; its checkpoint, model and report are written.
    """
    from patchloom.training.run import train

    given = _given(out=out, tokenizer=tokenizer, data=data, encoder=encoder)
    return train("generate", method, settings | given)


def segment(
    method: str,
    /,
    *,
    out: str | Path,
    data: str | Path | None = None,
    encoder: str | Path | None = None,
    **settings: Any,
) -> Run:
    """Train a decoder that gives every pixel a class.

    Args:
        method: Name of the decoder: linear, bn, upernet …; `list_methods("segment")` has all.
        out: Run folder; empty or absent, unless `resume=True` goes on with the run in it or `overwrite=True`.
        data: Images with masks: a folder with images and masks in it, FILE.csv, shards or hf:NAME with masks,
            camvid:FOLDER:train, ade20k:FOLDER:train.
        encoder: Bundle, run, or name of a timm model.
        **settings: Further fields of the method's settings class; `patchloom segment METHOD --help` explains them.

    Returns:
        The run: its folder `path`, its `model` (a bundle with the decoder beside it), its `report`, `summary`.

    Raises:
        UsageError: Unknown method or setting, or a request that cannot be carried out.
        KeyboardInterrupt: The run was interrupted; its checkpoint, model and report are written.
    """
    from patchloom.training.run import train

    return train("segment", method, settings | _given(out=out, data=data, encoder=encoder))


def detect(
    method: str,
    /,
    *,
    out: str | Path,
    data: str | Path | None = None,
    encoder: str | Path | None = None,
    **settings: Any,
) -> Run:
    """Train a detector of objects on boxes and outlines.

    Args:
        method: Name of the method: vit_comer.
        out: Run folder; empty or absent, unless `resume=True` goes on with the run in it or `overwrite=True`.
        data: A JSON file of COCO's layout.
        encoder: Bundle, run, or name of a timm model.
        **settings: Further fields of the method's settings class; `patchloom detect METHOD --help` explains them.

    Returns:
        The run: its folder `path`, its `model` (a bundle with the detector beside it), its `report`, `summary`.

    Raises:
        UsageError: Unknown method or setting, or a request that cannot be carried out.
        KeyboardInterrupt: The run was interrupted; its checkpoint, model and report are written.
    """
    from patchloom.training.run import train

    return train("detect", method, settings | _given(out=out, data=data, encoder=encoder))


def anomaly(
    method: str,
    /,
    *,
    out: str | Path,
    data: str | Path | None = None,
    encoder: str | Path | None = None,
    **settings: Any,
) -> Run:
    """Train a detector of defects on good images alone, and measure it where there are defects to measure on.

    Args:
        method: Name of the method: ear.
        out: Run folder; empty or absent, unless `resume=True` goes on with the run in it or `overwrite=True`.
        data: Good images: a folder of MVTec AD's layout, a folder per kind of defect, good images alone …
        encoder: Bundle, run, or name of a timm model that sees what stands out; default: edges.
        **settings: Further fields of the method's settings class; `patchloom anomaly METHOD --help` explains them.

    Returns:
        The run: its folder `path`, its `model`, its `report`, and its figures, `summary`.

    Raises:
        UsageError: Unknown method or setting, or a request that cannot be carried out.
        KeyboardInterrupt: The run was interrupted; its checkpoint, model and report are written.
    """
    from patchloom.evaluate.anomaly.run import train

    return train(method, settings | _given(out=out, data=data, encoder=encoder))


def clean(
    method: str,
    /,
    *,
    out: str | Path | None = None,
    data: str | Path | None = None,
    encoder: str | Path | nn.Module | None = None,
    **settings: Any,
) -> Any:
    """Rid the features of an encoder of artefacts, without labels; or say whether it has any.

    Args:
        method: Name of the method: diagnose, ph_reg; `list_methods("clean")` has all.
        out: Run folder; empty or absent, unless `resume=True` goes on with the run in it or `overwrite=True`. Of
            diagnose a JSON file, and not needed.
        data: Images, as for `pretrain`; labels play no part.
        encoder: What is cleaned: bundle, run, or name of a timm model, whose published weights are fetched.
        **settings: Further fields of the method's settings class; `patchloom clean METHOD --help` explains them.

    Returns:
        The run: its folder `path`, its `model` (a bundle), its `report` and its `summary`. Of diagnose the figures.

    Raises:
        UsageError: Unknown method or setting, or a request that cannot be carried out.
        KeyboardInterrupt: The run was interrupted; its checkpoint, model and report are written.
    """
    from patchloom.evaluate.run import clean_by

    return clean_by(method, settings | _given(out=out, data=data, encoder=encoder))


def distill(
    method: str,
    /,
    *,
    out: str | Path,
    data: str | Path | None = None,
    teacher: str | Path | None = None,
    encoder: str | Path | None = None,
    **settings: Any,
) -> Run:
    """Teach a small model what a large one knows.

    Args:
        method: Name of the method: logits, scalekd, deit_lt, g2sd_generic, g2sd_specific.
        out: Run folder; empty or absent, unless `resume=True` goes on with the run in it or `overwrite=True`.
        data: Images, as for `pretrain`; labelled, but for g2sd_generic.
        teacher: Bundle, run, or name of a timm model.
        encoder: The student: name of a timm model, or the bundle or run to start from; default: the method's.
        **settings: Further fields of the method's settings class; `patchloom distill METHOD --help` explains them.

    Returns:
        The run: its folder `path`, its `model` (a bundle of the student alone), its `report` and its `summary`.

    Raises:
        UsageError: Unknown method or setting, or a request that cannot be carried out.
        KeyboardInterrupt: The run was interrupted; its checkpoint, model and report are written.
    """
    from patchloom.training.run import train

    return train("distill", method, settings | _given(out=out, data=data, teacher=teacher, encoder=encoder))


def evaluate(
    protocol: str,
    /,
    *,
    encoder: str | Path | nn.Module | None = None,
    train: str | Path | None = None,
    test: str | Path | None = None,
    out: str | Path | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Measure an encoder on labelled images.

    Args:
        protocol: Name of the evaluation: knn, linear, logistic, segmentation …; `list_methods("evaluate")` has all.
        encoder: Bundle, run, timm model with published weights, a module, or the word pixels for raw pixels.
        train: Labelled images to learn from.
        test: Labelled images to measure on.
        out: Also write the figures to this JSON file.
        **settings: Further fields of the evaluation's settings class; `patchloom evaluate NAME --help` explains them.
            Some evaluations take others than the above, such as `encoders` of compare or `game` of rl.

    Returns:
        The `score` (`score_name` says which) with its 95 % `interval`, the number of test images `n`, the width `dim`
        of the features, `skipped` images, `seconds`, and what the evaluation chose; of a classification also
        `accuracy` (a fraction), `balanced_accuracy`, `macro_f1` and `auroc` with their `intervals`, and
        `per_class_accuracy`.

    Raises:
        UsageError: Unknown evaluation or setting, or data that cannot be used.
    """
    from patchloom.evaluate.run import measure

    return measure(protocol, settings | _given(encoder=encoder, train=train, test=test, out=out))[0]


def attack(
    method: str,
    /,
    *,
    encoder: str | Path | nn.Module | Sequence[Any],
    victim: str | Path | nn.Module | Sequence[Any] | Mapping[str, Any],
    data: str | Path,
    out: str | Path,
    **settings: Any,
) -> AttackRun:
    """Measure how easily models are fooled.

    Args:
        method: Name of the attack: dta.
        encoder: Public encoder the attacker knows (bundle, run, timm model, module), or several.
        victim: Models to attack: a run of `adapt`, a bundle, a module; several as a list, or by name.
        data: Labelled images to attack.
        out: Folder for attacked images, figures and report.
        **settings: Further fields of the attack's settings class; `patchloom attack NAME --help` explains them.

    Returns:
        What was left behind: its folder `path`, its `report` and its `summary`, whose `table` has the figures of each
        attack on each victim.

    Raises:
        UsageError: Unknown attack or setting, or models and images that cannot be used.
    """
    from patchloom.attack.run import attack_by

    return attack_by(method, settings | _given(encoder=encoder, victim=victim, data=data, out=out))


def explain(
    explanation: str,
    /,
    *,
    model: str | Path | nn.Module,
    images: str | Path,
    out: str | Path,
    **settings: Any,
) -> Gallery:
    """Show what an encoder or a classifier looks at.

    Args:
        explanation: Name of the explanation: attention, compare, prompt_cam.
        model: Bundle, run, name of a timm model, or a module.
        images: Images to explain.
        out: Folder of the gallery.
        **settings: Further fields of the explanation's settings class; `patchloom explain NAME --help` explains them.

    Returns:
        The gallery: its folder `path`, its `page` and its `figures`.

    Raises:
        UsageError: Unknown explanation or setting, or a request that cannot be carried out.
    """
    from patchloom.explain.run import show

    return show(explanation, settings | _given(model=model, images=images, out=out))


def load(path: str | Path, adapters: Sequence[str | Path] | Mapping[str, str | Path] = ()) -> nn.Module:
    """Return the timm module of a bundle (or of a run folder, whose `model/` is meant), in eval mode.

    Of a run of `adapt gcab` it is the whole: normalised images (B, C, H, W) to logits (B, classes of all tasks). Of a
    run of `segment` on images, too: normalised images to logits (B, classes, H, W); its `encoder` is the timm module,
    and `segment(image)` says the class of every pixel of an image in [0, 1].

    Args:
        path: The bundle or run.
        adapters: Runs or files of adapters to put in (a list, or a mapping from names); the first of them acts, and
            `patchloom.models.adapters` has what switches, serves, merges and removes them.

    Raises:
        UsageError: `path` holds no bundle, or an adapter was made for another encoder.
    """
    from patchloom.models.bundle import load_model

    if not adapters and any((folder / "decoder.json").exists() for folder in (Path(path), Path(path) / "model")):
        from patchloom.segment.saved import holds_segmenter, load_segmenter

        if holds_segmenter(path):
            model = load_segmenter(path)
            model.full_size = True
            return model
    return load_model(path, adapters)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Return the tokenizer at a place: images to a grid of token ids and, of most, back.

    Args:
        path: A codebook (folder or file), a run of `train_tokenizer` or its `model/`, or a run that keeps one.

    Raises:
        UsageError: There is none, or it is damaged.
    """
    from patchloom.tokenizers.tokenizer import open_tokenizer

    return open_tokenizer(path)


def load_reference(system: str, checkpoint: Mapping[str, Any] | str | Path, **config: Any) -> nn.Module:
    """Return our module with the weights of a published implementation's checkpoint, in eval mode.

    Args:
        system: Name of the system, see `list_references`.
        checkpoint: State dict (wrapper keys such as `model` or `module.` are handled) or the path of one.
        **config: What shapes do not tell, under the names of the published implementation.

    Raises:
        UsageError: Unknown system or setting, or tensors missing or left over (they are named).
    """
    from patchloom.systems.published import load_reference as load_published

    return load_published(system, checkpoint, **config)


def list_methods(verb: str) -> list[str]:
    """Return the names of the methods of a verb (`pretrain`, `adapt`, `distill`, `segment`, `evaluate`, …), sorted.

    Raises:
        UsageError: There is no such verb.
    """
    if verb not in registry.METHODS:
        raise unknown_name("verb", verb, registry.METHODS)
    return sorted(registry.METHODS[verb])


def list_references() -> list[str]:
    """Return the names of the systems whose published checkpoints can be loaded, sorted."""
    return sorted(registry.REFERENCES)


def list_sources() -> dict[str, str]:
    """Return the ways to name a data source, each with one line of help."""
    return dict(registry.SOURCES)


def _given(**values: Any) -> dict[str, Any]:
    """Return the values that were given; what was not is left to the defaults of the settings class."""
    return {name: value for name, value in values.items() if value is not None}
