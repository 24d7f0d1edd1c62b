"""The explanations as commands: each opens a model and images, and leaves a gallery."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from functools import partial
from typing import Any

import torch
from torch import Tensor

from patchloom.errors import UsageError
from patchloom.explain.attention import class_token_maps, grad_cam, gradient_attention, rollout
from patchloom.explain.commands_config import AttentionConfig, CompareConfig, TraitsConfig
from patchloom.explain.compare import SHORT, TITLES, compare, explainers_for
from patchloom.explain.gallery import Gallery, check_out, write_gallery
from patchloom.explain.prompt_cam import class_attention_maps, rank_heads, traits_between
from patchloom.explain.render import Tile, grid, overlay, side_of
from patchloom.explain.subject import ExplainConfig, Subject, class_number, open_subject
from patchloom.report.page import Figure, Section
from patchloom.report.pictures import middle_images
from patchloom.report.plots import curves

MOST_HEADS = 6
"""Heads drawn beside each other where none is more important than another."""


class AttentionGallery:
    """Where the encoder looks: heads of a block, rollout and, for classifiers, maps weighted by gradients."""

    config_class = AttentionConfig

    def __init__(self, config: AttentionConfig) -> None:
        self.config = config

    def run(self) -> Gallery:
        """Explain, and write the gallery."""
        config = self.config
        check_out(config.out, config.overwrite)
        subject = open_subject(config, needs_classes=False, kinds=("image", "clip", "volume"))
        heads = _by_batch(config, subject, lambda x, _: class_token_maps(subject.model, x, config.layer))
        maps = {
            "heads": heads,
            "rollout": _by_batch(config, subject, lambda x, _: rollout(subject.model, x, discard=config.discard)),
        }
        target = None
        if subject.class_names:
            target, _ = _targets(config, subject)
            maps["grad_cam"] = _by_batch(config, subject, partial(grad_cam, subject.model), target)
            maps["gradient_attention"] = _by_batch(config, subject, partial(gradient_attention, subject.model), target)
        sections = []
        for number, key in enumerate(subject.keys):
            image = subject.shown[number]
            panels: list[tuple[str, Tensor]] = [("rollout", maps["rollout"][number])]
            panels += [(SHORT[name], maps[name][number]) for name in ("grad_cam", "gradient_attention") if name in maps]
            panels.append(("mean of heads", heads[number].mean(0)))
            panels += [(f"head {head}", heads[number, head]) for head in range(min(heads.shape[1], MOST_HEADS))]
            image, panels = _middle(image, panels)
            text = "" if target is None else f"Gradients are those of {subject.name_of(int(target[number]))}."
            sections.append(Section(key, text, [_strip(image, panels, f"Attention maps of {key}")]))
        return write_gallery(
            config.out,
            title="Attention",
            subtitle=f"{config.model} on {config.images}",
            facts={"images": len(subject.keys), "heads": heads.shape[1], "block": config.layer},
            sections=sections,
            maps=maps,
            figures={"command": "explain attention", **_about(config, subject, target)},
            command=_command("attention", config),
            overwrite=config.overwrite,
        )


class TraitsGallery:
    """What a Prompt-CAM model decided by: the heads that matter for an image, or for one class against another."""

    config_class = TraitsConfig

    def __init__(self, config: TraitsConfig) -> None:
        self.config = config

    def run(self) -> Gallery:
        """Explain, and write the gallery."""
        config = self.config
        check_out(config.out, config.overwrite)
        if config.against is not None and config.class_name is None:
            raise UsageError(f"against={config.against} needs class_name: the class that is told from it")
        of_class = None if config.against is None else config.class_name
        subject = open_subject(config, needs_classes=True, of_class=of_class)
        return self._traits(subject) if config.against is None else self._contrast(subject)

    def _traits(self, subject: Subject) -> Gallery:
        config, model = self.config, subject.model
        target, probabilities = _targets(config, subject)
        predicted = probabilities.argmax(1)
        keep = None if config.until else min(config.top, _heads(subject))
        rankings = [
            rank_heads(model, x, t, keep, config.until)
            for x, t in zip(
                subject.inputs.split(config.batch_size), _on(subject, target).split(config.batch_size), strict=True
            )
        ]
        order = torch.cat([ranking.order for ranking in rankings]).cpu()
        fallen = torch.cat([ranking.probabilities for ranking in rankings]).cpu()
        kept = [row for ranking in rankings for row in ranking.kept]
        maps = _by_batch(config, subject, lambda x, t: class_attention_maps(model, x, t), target)
        others = _by_batch(config, subject, lambda x, t: class_attention_maps(model, x, t), predicted)
        sections, rows = [], []
        for number, key in enumerate(subject.keys):
            name, taken = subject.name_of(int(target[number])), subject.name_of(int(predicted[number]))
            agrees = bool(target[number] == predicted[number])
            share = float(probabilities[number, target[number]])
            # An image taken for something else: all heads of its class, and beside them those of the class it was
            # taken for.
            heads = kept[number] if agrees else order[number].tolist()[: max(config.top, MOST_HEADS)]
            image = subject.shown[number]
            named = [(f"head {head}", maps[number, head]) for head in heads]
            figures = [_strip(image, named, f"Where the prompt of {name} looks in {key}", first=name)]
            text = f"{name}, probability {share:.2f}."
            if not agrees:
                text = (
                    f"{name} has probability {share:.2f}; taken for {taken} ({float(probabilities[number].max()):.2f})."
                )
                named = [(f"head {head}", others[number, head]) for head in heads]
                figures.append(_strip(image, named, f"Where the prompt of {taken} looks in {key}", first=taken))
            text += f" Heads by importance: {', '.join(map(str, order[number].tolist()))}."
            if config.until is not None:
                text += f" {len(kept[number])} of them are enough." if agrees else ""
            sections.append(Section(key, text, figures))
            rows.append(
                {
                    "image": key,
                    "class": name,
                    "predicted": taken,
                    "probability": share,
                    "probability_of_predicted": float(probabilities[number].max()),
                    "heads_by_importance": order[number].tolist(),
                    "kept": kept[number],
                    "probability_as_heads_go": fallen[number].tolist(),
                }
            )
        right = int((target == predicted).sum())
        facts = {"images": len(subject.keys), "classes": len(subject.class_names), "taken for the class shown": right}
        sections.append(_pruning(fallen, probabilities.gather(1, target[:, None])))
        return write_gallery(
            config.out,
            title="Prompt-CAM attention by class",
            subtitle=f"{config.model} on {config.images}",
            facts=facts,
            sections=sections,
            maps={"maps": maps, "maps_of_predicted": others, "logits": _logits(config, subject)},
            figures={"command": "explain prompt_cam", **_about(config, subject, target), "images_explained": rows},
            command=_command("prompt_cam", config),
            overwrite=config.overwrite,
        )

    def _contrast(self, subject: Subject) -> Gallery:
        config = self.config
        assert config.class_name is not None
        assert config.against is not None
        a, b = (class_number(name, subject.class_names) for name in (config.class_name, config.against))
        of_first = (subject.true == a).nonzero().flatten()
        rows = of_first if len(of_first) else torch.arange(len(subject.keys))
        inputs = subject.inputs[rows.to(next(subject.model.parameters()).device)]
        parts = [traits_between(subject.model, x, a, b) for x in inputs.split(config.batch_size)]
        drops, lead = (torch.cat([getattr(part, name) for part in parts]).cpu() for name in ("drops", "lead"))
        maps_a, maps_b = (torch.cat([getattr(part, name) for part in parts]).cpu() for name in ("maps_a", "maps_b"))
        order = drops.mean(0).argsort(descending=True, stable=True).tolist()
        shown = order[: config.top]
        table: list[dict[str, object]] = [
            {
                "head": head,
                f"lead of {config.class_name} owed to it": round(float(drops[:, head].mean()), 3),
                "on images": f"{int((drops[:, head] > 0).sum())} of {len(rows)}",
            }
            for head in order
        ]
        words = ", ".join(f"head {head} ({float(drops[:, head].mean()):+.2f})" for head in shown)
        text = (
            f"Over {config.against}, {config.class_name} leads by {float(lead.mean()):.2f} on average (difference of "
            f"logits); most of it is owed to {words}: what is lost when neither prompt may look through that head."
        )
        sections = [Section("Heads", text, table=table)]
        for place, number in enumerate(rows.tolist()):
            image = subject.shown[number]
            lines = [
                _panels(image, [(f"head {head}", maps[place, head]) for head in shown], len(shown) + 1, first)
                for first, maps in ((config.class_name, maps_a), (config.against, maps_b))
            ]
            figure = grid(lines, alt=f"Where the prompts of {config.class_name} and {config.against} look")
            sections.append(Section(subject.keys[number], f"Lead {float(lead[place]):+.2f}.", [figure]))
        return write_gallery(
            config.out,
            title=f"{config.class_name} against {config.against}",
            subtitle=f"{config.model} on {config.images}",
            facts={"images": len(rows), "mean lead": round(float(lead.mean()), 2), "head that matters most": order[0]},
            sections=sections,
            maps={"maps_a": maps_a, "maps_b": maps_b, "drops": drops, "lead": lead},
            figures={
                "command": "explain prompt_cam",
                **_about(config, subject, None),
                "images": [subject.keys[number] for number in rows.tolist()],
                "heads_by_importance": order,
            },
            command=_command("prompt_cam", config),
            overwrite=config.overwrite,
        )


class CompareGallery:
    """Several explanations side by side, with their insertion and deletion scores."""

    config_class = CompareConfig

    def __init__(self, config: CompareConfig) -> None:
        self.config = config

    def run(self) -> Gallery:
        """Explain, and write the gallery."""
        config = self.config
        check_out(config.out, config.overwrite)
        subject = open_subject(config, needs_classes=True)
        names = explainers_for(subject.model, config.methods)
        target, probabilities = _targets(config, subject)
        maps = compare(
            subject.model,
            subject.inputs,
            _on(subject, target),
            names,
            steps=config.steps,
            batch_size=config.batch_size,
        )
        table: list[dict[str, object]] = []
        for name, one in maps.items():
            insertion, deletion = float(one.scores.insertion.mean()), float(one.scores.deletion.mean())
            row = {"insertion ↑": insertion, "deletion ↓": deletion, "difference ↑": insertion - deletion}
            table.append({"explanation": TITLES[name], **{key: f"{value:.3f}" for key, value in row.items()}})
        fraction = next(iter(maps.values())).scores.curves.fraction.tolist()
        charts = [
            curves(
                {TITLES[n]: (fraction, getattr(one.scores.curves, kind).mean(0).tolist()) for n, one in maps.items()},
                x_label=label,
                y_label="probability of the class",
                title=kind.capitalize(),
            )
            for kind, label in (("insertion", "share given back"), ("deletion", "share taken away"))
        ]
        text = "Area under the curves, mean over images. The same model and class judge all of them."
        sections = [Section("Faithfulness", text, charts, table)]
        for number in range(min(config.pictured, len(subject.keys))):
            panels = [
                (
                    f"{float(one.scores.insertion[number] - one.scores.deletion[number]):+.2f} {SHORT[n]}",
                    one.maps[number],
                )
                for n, one in maps.items()
            ]
            name, share = subject.name_of(int(target[number])), float(probabilities[number, target[number]])
            text = f"{name}, probability {share:.2f}. Above each map: insertion less deletion."
            key = subject.keys[number]
            sections.append(Section(key, text, [_strip(subject.shown[number], panels, f"Explanations of {key}")]))
        best = max(maps, key=lambda n: float((maps[n].scores.insertion - maps[n].scores.deletion).mean()))
        scores = {n: {k: getattr(one.scores, k).tolist() for k in ("insertion", "deletion")} for n, one in maps.items()}
        return write_gallery(
            config.out,
            title="Explanations compared",
            subtitle=f"{config.model} on {config.images}",
            facts={"images": len(subject.keys), "steps": config.steps, "most faithful": TITLES[best]},
            sections=sections,
            maps={n: one.maps for n, one in maps.items()},
            figures={"command": "explain compare", **_about(config, subject, target), "scores": scores, "table": table},
            command=_command("compare", config),
            overwrite=config.overwrite,
        )


def _targets(config: ExplainConfig, subject: Subject) -> tuple[Tensor, Tensor]:
    """Return the class shown for each image, (n,) int64, and the probabilities (n, C)."""
    probabilities = _logits(config, subject).softmax(-1)
    if config.class_name is not None:
        number = class_number(config.class_name, subject.class_names)
        return torch.full((len(subject.keys),), number), probabilities
    return torch.where(subject.true >= 0, subject.true, probabilities.argmax(1)), probabilities


@torch.no_grad()
def _logits(config: ExplainConfig, subject: Subject) -> Tensor:
    return torch.cat([subject.model(x).float().cpu() for x in subject.inputs.split(config.batch_size)])


def _by_batch(
    config: ExplainConfig, subject: Subject, explain: Callable[[Tensor, Any], Tensor], target: Tensor | None = None
) -> Tensor:
    """Return maps of all images, explained a batch at a time, on the CPU."""
    inputs = subject.inputs.split(config.batch_size)
    classes = [None] * len(inputs) if target is None else _on(subject, target).split(config.batch_size)
    return torch.cat([explain(x, t).detach().float().cpu() for x, t in zip(inputs, classes, strict=True)])


def _on(subject: Subject, target: Tensor) -> Tensor:
    return target.to(next(subject.model.parameters()).device)


def _heads(subject: Subject) -> int:
    from patchloom.explain.attention import encoder_of

    return int(encoder_of(subject.model).blocks[-1].attn.num_heads)


def _panels(image: Tensor, maps: list[tuple[str, Tensor]], count: int, first: str = "image") -> list[Tile]:
    side = side_of(count, image)
    return [(first, image), *((label, overlay(image, one, side)) for label, one in maps)]


def _middle(inputs: Tensor, maps: list[tuple[str, Tensor]]) -> tuple[Tensor, list[tuple[str, Tensor]]]:
    """Return what lies in the middle of a clip or volume (C, *sides) as an image, and its maps; images as they are."""
    pictures, found = middle_images(inputs[None], torch.stack([values for _, values in maps])[None])
    return pictures[0], [(name, found[0, number]) for number, (name, _) in enumerate(maps)]


def _strip(image: Tensor, maps: list[tuple[str, Tensor]], alt: str, first: str = "image") -> Figure:
    return grid([_panels(image, maps, len(maps) + 1, first)], alt=alt)


def _pruning(fallen: Tensor, start: Tensor) -> Section:
    """Return how the probability falls as heads are blurred, least important first."""
    whole = torch.cat([start, fallen], 1)
    count = list(range(whole.shape[1]))
    chart = curves(
        {"mean over images": (count, whole.mean(0).tolist())},
        x_label="heads blurred, least important first",
        y_label="probability of the class",
        title="Class probability as attention heads are pruned",
        bands={"mean over images": (whole.quantile(0.25, 0).tolist(), whole.quantile(0.75, 0).tolist())},
    )
    return Section("Attention head pruning", "The band holds the middle half of the images.", [chart])


def _about(config: ExplainConfig, subject: Subject, target: Tensor | None) -> dict[str, Any]:
    """Return what every `explanation.json` says."""
    return {
        "model": str(config.model) if not isinstance(config.model, torch.nn.Module) else type(config.model).__name__,
        "data": config.images,
        "images": subject.keys,
        "classes": subject.class_names,
        "class_shown": None if target is None else [subject.name_of(int(number)) for number in target],
        "unreadable_images": len(subject.skipped),
        "skipped": [{"file": key, "reason": reason} for key, reason in subject.skipped],
    }


def _command(method: str, config: ExplainConfig) -> str:
    """Return the command that repeats the explanation."""
    import shlex

    words = ["patchloom", "explain", method]
    for one in fields(config):
        value = getattr(config, one.name)
        if one.name == "model" and isinstance(value, torch.nn.Module):
            value = "MODEL"
        if value == one.default or one.name == "overwrite":
            continue
        words += [f"--{one.name}", f"[{','.join(value)}]" if isinstance(value, tuple) else str(value)]
    return shlex.join(words)
