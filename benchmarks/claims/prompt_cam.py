"""Prompt-CAM's claims on composed images whose class-defining part is known (arXiv 2501.09333).

    python -m benchmarks.claims.prompt_cam --out scratch/claims/prompt_cam [--write]

For each seed: an encoder is trained on pieces of the embedded photographs, frozen, and given class prompts for images
composed of other pieces (`composed`), in the last block alone and in every block. Then maps of Prompt-CAM and the usual
explanations, of the same model and of a linear probe on the same encoder, are compared with where the texture lies, and
by insertion and deletion. Every stage leaves its figures in `--out`, so an interrupted series goes on where it stopped.
One seed takes about ten minutes on one core.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from sklearn.linear_model import LogisticRegression
from timm.models import register_model
from timm.models.vision_transformer import vit_tiny_patch16_224
from torch import Tensor, nn
from torch.nn import functional as F

import patchloom as pl
from benchmarks.claims.ccvit import Series
from benchmarks.claims.composed import TEXTURES, composed, pieces, write_folder
from benchmarks.harness import machine, markdown_table, mean_and_deviation, rewrite
from patchloom.data.embedded import PHOTOS
from patchloom.encoders import create_encoder, normalize, pooled
from patchloom.explain.attention import class_token_maps, grad_cam, gradient_attention, rollout
from patchloom.explain.compare import prompt_map, random_map
from patchloom.explain.faithfulness import insertion_deletion, mass_inside, pointing_game
from patchloom.explain.prompt_cam import class_attention_maps
from patchloom.models.adapters import plain, remove, save_adapter
from patchloom.systems.prompt_cam.model import PromptCAM
from patchloom.training.schedule import warmup_cosine

PAGE = Path(__file__).parents[2] / "docs" / "systems" / "prompt_cam.md"
SEEDS = (0, 1, 2)
IMAGES = 200
COMMON = {"batch_size": 64, "num_workers": 1, "probe_every": 0, "precision": "32-true", "overwrite": True}


@register_model
def vit_claims_patch4_32(pretrained: bool = False, **kwargs: Any) -> Any:
    """The encoder of the claims: width 96, four blocks, six heads, patches of 4 pixels."""
    shape = {"img_size": 32, "patch_size": 4, "embed_dim": 96, "depth": 4, "num_heads": 6}
    return vit_tiny_patch16_224(pretrained, **{**shape, **kwargs})


def pretrain(series: Series, seed: int) -> dict[str, Any]:
    """Train an encoder to tell photographs apart by their pieces, with cutmix."""
    train, test = (
        write_folder(series.out / f"pieces_{split}", *pieces(count, split, 0), list(PHOTOS))
        for split, count in (("train", 5400), ("test", 720))
    )
    run = pl.adapt(
        "finetune",
        data=str(train),
        test=str(test),
        encoder="vit_claims_patch4_32",
        out=str(series.out / f"encoder_{seed}"),
        max_steps=400,
        lr=1.5e-3,
        lr_base_batch=None,
        warmup_epochs=1,
        layer_decay=1.0,
        drop_path=0.0,
        auto_augment=None,
        color_jitter=0.0,
        erasing=0.0,
        mixup=0.0,
        cutmix=1.0,
        label_smoothing=0.0,
        crop_scale=(0.5, 1.0),
        init_scale=1.0,
        pool="cls",
        seed=seed,
        **COMMON,
    )
    return run.summary


def deep(series: Series, seed: int) -> dict[str, Any]:
    """Train class prompts in every block of the frozen encoder."""
    train, test = (
        write_folder(series.out / f"composed_{split}", *composed(count, split, 0)[:2], list(TEXTURES))
        for split, count in (("train", 4800), ("test", 600))
    )
    run = pl.adapt(
        "prompt_cam",
        data=str(train),
        test=str(test),
        encoder=str(series.out / f"encoder_{seed}" / "model"),
        out=str(series.out / f"deep_{seed}"),
        max_steps=400,
        optimizer="adamw",
        lr=0.03,
        warmup_epochs=1,
        drop_path=0.0,
        prompt_dropout=0.0,
        seed=seed,
        **COMMON,
    )
    return run.summary


def last(series: Series, seed: int) -> dict[str, Any]:
    """Train class prompts in the last block alone: what enters it never changes, so it is computed once."""
    torch.manual_seed(seed)
    source = str(series.out / f"encoder_{seed}" / "model")
    model = PromptCAM(create_encoder(source).eval(), len(TEXTURES), prompt_dropout=0.0, helper_prompts=0).eval()
    images, labels, _ = composed(9600, "train", 0)
    with torch.no_grad():
        inputs = normalize(images.float() / 255, model.encoder)
        entering = [model.added.before_last(part) for part in inputs.split(200)]
    tokens, steps, rate = torch.cat([part.x for part in entering]), 1500, 0.1
    optimizer = torch.optim.AdamW(model.added.parameters(), lr=rate, weight_decay=1e-3)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = warmup_cosine(step, steps, 50, rate, 0.0)
        chosen = torch.randint(len(tokens), (128,))
        batch = entering[0]._replace(x=tokens[chosen], prompts=model.added.prompts)
        loss = F.cross_entropy(model.added.last(batch)[0], labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    folder = series.out / f"last_{seed}"
    save_adapter(model.encoder, folder, encoder_path=source, class_names=list(TEXTURES), overwrite=True)
    return {"loss": float(loss.detach())}


def measure(series: Series, seed: int, kind: str = "last") -> dict[str, Any]:
    """Compare maps on test images that both the prompts and the probe get right."""
    model: Any = pl.load(str(series.out / f"{kind}_{seed}"))
    train, train_labels, _ = composed(2400, "train", 1)
    test, labels, masks = composed(600, "test", 0)
    inputs = normalize(test.float() / 255, model)
    with torch.no_grad(), plain(model):
        features = _features(model, normalize(train.float() / 255, model))
        held = _features(model, inputs)
    probe, probe_accuracy = _probe(model, features, train_labels, held, labels)
    with torch.no_grad():
        logits = torch.cat([model(part) for part in inputs.split(100)])
    right = (logits.argmax(1) == labels) & (_predict(probe, inputs) == labels)
    chosen = right.nonzero().flatten()[:IMAGES]
    x, target, mask = inputs[chosen], labels[chosen], masks[chosen]
    maps: dict[str, Callable[[], Tensor]] = {
        "Prompt-CAM": lambda: prompt_map(model, x, target),
        "class-token attention": lambda: class_token_maps(probe, x).mean(1),
        "attention rollout": lambda: rollout(probe, x),
        "Grad-CAM of the probe": lambda: grad_cam(probe, x, target),
        "Grad-CAM of the prompts": lambda: grad_cam(model, x, target),
        "gradient-weighted attention of the probe": lambda: gradient_attention(probe, x, target),
        "gradient-weighted attention of the prompts": lambda: gradient_attention(model, x, target),
        "random map": lambda: random_map(model, x, target),
    }
    scores = {}
    for name, make in maps.items():
        saliency = make().detach()
        figures = {
            "pointing": float(pointing_game(saliency, mask).float().mean()),
            "inside": float(mass_inside(saliency, mask).mean()),
        }
        for judge, classifier in (("prompts", model), ("probe", probe)):
            found = insertion_deletion(classifier, x, saliency, target, steps=16)
            figures[f"insertion_{judge}"] = float(found.insertion.mean())
            figures[f"deletion_{judge}"] = float(found.deletion.mean())
        scores[name] = figures
        print(name, {key: round(value, 3) for key, value in figures.items()}, flush=True)
    wrong = (target + 1) % len(TEXTURES)
    pairs = [class_attention_maps(model, x, classes).flatten(2) for classes in (target, wrong)]
    return {
        "images": len(chosen),
        "area": float(masks.float().mean()),
        "accuracy": float((logits.argmax(1) == labels).float().mean()),
        "probe_accuracy": probe_accuracy,
        "correlation_true_wrong": _correlation(*(pair.mean(1) for pair in pairs)),
        "scores": scores,
    }


def _features(encoder: Any, images: Tensor) -> Tensor:
    return torch.cat([pooled(encoder, part, "cls") for part in images.split(200)])


def _probe(model: Any, features: Tensor, labels: Tensor, held: Tensor, truth: Tensor) -> tuple[Any, float]:
    """Return the plain encoder with a linear probe as its head, and the probe's accuracy."""
    mean, deviation = features.mean(0), features.std(0).clamp(min=1e-6)
    fitted = LogisticRegression(C=1.0, max_iter=1000).fit(((features - mean) / deviation).numpy(), labels.numpy())
    probe = copy.deepcopy(model)
    remove(probe)
    probe.reset_classifier(len(TEXTURES))
    weight = torch.from_numpy(fitted.coef_).float() / deviation
    with torch.no_grad():
        probe.head.weight.copy_(weight)
        probe.head.bias.copy_(torch.from_numpy(fitted.intercept_).float() - weight @ mean)
        accuracy = float((probe.head(held).argmax(1) == truth).float().mean())
    return probe.eval(), accuracy


@torch.no_grad()
def _predict(model: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([model(part).argmax(1) for part in images.split(100)])


def _correlation(a: Tensor, b: Tensor) -> float:
    """Return the mean Pearson correlation of maps (B, N)."""
    a, b = (value - value.mean(1, keepdim=True) for value in (a, b))
    return float(((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1)).clamp(min=1e-12)).mean())


class Runs:
    """The figures of all seeds that were measured with one kind of prompts."""

    def __init__(self, series: Series, kind: str) -> None:
        found = [series.known(f"measure_{kind}_{seed}") for seed in SEEDS]
        self.runs = [run for run in found if run is not None]

    def over(self, name: str, key: str, factor: float = 1.0) -> list[float]:
        """Return a figure of a map for each seed."""
        return [factor * run["scores"][name][key] for run in self.runs]

    def less(self, name: str, judge: str = "prompts") -> list[float]:
        """Return insertion less deletion for each seed."""
        pair = zip(self.over(name, f"insertion_{judge}"), self.over(name, f"deletion_{judge}"), strict=True)
        return [insertion - deletion for insertion, deletion in pair]

    def claims(self) -> list[list[str]]:
        """Return the claims: the measured figure, and whether the check holds."""
        ours, token, cam, flow = "Prompt-CAM", "class-token attention", "Grad-CAM of the probe", "attention rollout"
        ratio = [a / b for a, b in zip(self.over(ours, "inside"), self.over(token, "inside"), strict=True)]
        mass, peak = (_gain(self.over(ours, key, 100), self.over(cam, key, 100)) for key in ("inside", "pointing"))
        rollout_gain, cam_gain = (_gain(self.less(ours), self.less(other)) for other in (flow, cam))
        accuracy, probe = ([100 * run[key] for run in self.runs] for key in ("accuracy", "probe_accuracy"))
        like = [run["correlation_true_wrong"] for run in self.runs]
        cells = [
            (f"{mean_and_deviation(ratio, 2)} ×", _mean(ratio) >= 2),
            (
                f"mass {mean_and_deviation(mass, 1)}, peak {mean_and_deviation(peak, 1)} points",
                _mean(mass) > 0 and _mean(peak) > 0,
            ),
            (mean_and_deviation(rollout_gain, 3), _mean(rollout_gain) >= 0.05),
            (mean_and_deviation(cam_gain, 3), _mean(cam_gain) > 0),
            (mean_and_deviation(like, 2), _mean(like) < 0.5),
            (
                f"{mean_and_deviation(accuracy, 1)} % against {mean_and_deviation(probe, 1)} %",
                _mean(accuracy) >= _mean(probe) - 3,
            ),
        ]
        return [[measured, "yes" if holds else "**no**"] for measured, holds in cells]

    def rows(self) -> list[list[str]]:
        """Return the figures of every map."""
        rows = []
        for name in self.runs[0]["scores"]:
            cells = [mean_and_deviation(self.over(name, key, 100), 1) for key in ("pointing", "inside")]
            for judge in ("prompts", "probe"):
                cells += [mean_and_deviation(self.over(name, f"{k}_{judge}"), 3) for k in ("insertion", "deletion")]
                cells.append(mean_and_deviation(self.less(name, judge), 3))
            rows.append([name, *cells])
        return rows


def tables(series: Series) -> str:
    """Return the claims with whether they hold, and the figures of every map, for each kind of prompts."""
    kinds = {kind: Runs(series, kind) for kind in KINDS}
    kinds = {kind: runs for kind, runs in kinds.items() if runs.runs}
    claims = [
        ["1 faithful: attention on the texture, against the class token's", "≥ 2 ×"],
        ["1 and above Grad-CAM of the probe", "both > 0"],
        ["2 insertion − deletion, above rollout by", "≥ 0.05"],
        ["2 and above Grad-CAM of the probe by", "> 0"],
        ["3 class-specific: correlation of maps of a true and a wrong class", "< 0.5"],
        ["4 little accuracy lost against a linear probe", "≥ −3 points"],
    ]
    for runs in kinds.values():
        for row, cells in zip(claims, runs.claims(), strict=True):
            row += cells
    titles = [cell for kind in kinds for cell in (KINDS[kind], "holds")]
    parts = [machine(), markdown_table(["claim", "check", *titles], claims)]
    header = ["map", "peak on the texture, %", "mass on it, %"]
    header += [
        f"{k} ({judge})" for judge in ("prompts", "probe") for k in ("insertion ↑", "deletion ↓", "difference ↑")
    ]
    for kind, runs in kinds.items():
        images = ", ".join(str(run["images"]) for run in runs.runs)
        area = 100 * _mean([run["area"] for run in runs.runs])
        parts.append(
            f"Every map with {KINDS[kind]}, judged by that model and by the linear probe; {len(runs.runs)} seeds, "
            f"{images} test images, of which the texture covers {area:.1f} %:"
        )
        parts.append(markdown_table(header, runs.rows()))
    return "\n\n".join(parts)


def _gain(a: list[float], b: list[float]) -> list[float]:
    return [x - y for x, y in zip(a, b, strict=True)]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


KINDS = {"last": "prompts in the last block", "deep": "prompts in every block"}
STAGES = {
    "encoder": pretrain,
    "last": last,
    "measure_last": partial(measure, kind="last"),
    "deep": deep,
    "measure_deep": partial(measure, kind="deep"),
}


def main() -> None:
    """Run what was not run yet, and print or write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("scratch/claims/prompt_cam"))
    parser.add_argument("--seeds", type=int, nargs="*", default=list(SEEDS))
    parser.add_argument("--stages", nargs="*", default=list(STAGES), choices=list(STAGES))
    parser.add_argument("--write", action="store_true", help="write the tables to docs/systems/prompt_cam.md")
    options = parser.parse_args()
    series = Series(options.out)
    for seed in options.seeds:
        for stage in options.stages:
            series.get(f"{stage}_{seed}", partial(STAGES[stage], series, seed))
    if not any(series.known(f"measure_{kind}_{seed}") for kind in KINDS for seed in SEEDS):
        return
    text = tables(series)
    print(text)
    if options.write:
        rewrite(PAGE, "claims", text)


if __name__ == "__main__":
    main()
