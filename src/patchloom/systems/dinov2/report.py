"""The report pages of a DINOv2 run: where teacher and student look, what the teacher's prototypes stand for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from patchloom.data.base import Source
from patchloom.encoders import attends, class_attention, grid_size, normalize
from patchloom.report import Section, curves, image_grid
from patchloom.report.figures import overlay
from patchloom.training.metrics import read_metrics, series
from patchloom.training.report import held_out_samples

if TYPE_CHECKING:
    from patchloom.systems.dinov2.method import Dinov2Method

POOL, PROTOTYPES, EXAMPLES = 256, 6, 8


def sections(method: Dinov2Method, images: Tensor) -> list[Section]:
    """Return the sections of a run for held-out images (n, C, H, W) uint8."""
    seen = [attention_section(method, images)] if attends(method.model.teacher.encoder) else []
    return [*seen, *teacher_section(method), prototype_section(method, images)]


def attention_section(method: Dinov2Method, images: Tensor) -> Section:
    """Return images under the class token's attention, mean over heads, of teacher and student."""
    pictures = method.pixels(images)
    inputs = normalize(pictures.to(method.device), method.encoder)
    height, width = grid_size(method.encoder, (images.shape[-2], images.shape[-1]))
    rows = {"image": pictures.float()}
    for name, network in (("teacher", method.model.teacher), ("student", method.model.student)):
        was_training = network.encoder.training
        attention = class_attention(network.encoder.eval(), inputs).float().cpu().mean(1)
        network.encoder.train(was_training)
        rows[name] = overlay(pictures.float(), attention.view(-1, height, width))
    return Section(
        title="Teacher and student",
        text="Where the class token of the teacher, which is shipped, and of the student looks in the last block.",
        figures=[image_grid(rows)],
    )


def teacher_section(method: Dinov2Method) -> list[Section]:
    """Return how evenly the teacher used its prototypes over the run, and its schedule."""
    rows = read_metrics(Path(method.config.out) / "metrics.csv")
    figures = []
    entropies = {
        "of the mean over images": series(rows, "teacher_entropy"),
        "of single images": series(rows, "teacher_doubt"),
    }
    if min(len(steps) for steps, _ in entropies.values()) > 1:
        title = "Entropy of the teacher's distributions"
        figures.append(curves(entropies, x_label="step", y_label="share of log K", title=title))
    for name, label, title in (
        ("teacher_temperature", "temperature", "Temperature of the teacher"),
        ("teacher_momentum", "share kept", "Momentum of the teacher"),
    ):
        steps, values = series(rows, name)
        if len(steps) > 1:
            figures.append(curves({name: (steps, values)}, x_label="step", y_label=label, title=title))
    text = (
        "Of the mean: near 1 the images of a batch are spread over all prototypes, towards 0 they gather on one. Of "
        "single images: near 1 the teacher says nothing of any. Self-distillation collapses either way."
    )
    return [Section(title="Teacher entropy, temperature and momentum", text=text, figures=figures)] if figures else []


def prototype_section(method: Dinov2Method, images: Tensor) -> Section:
    """Return how often each prototype comes first, and the images the commonest ones stand for."""
    source = method.source
    pool = held_out_samples(source, method.input_size, POOL) if isinstance(source, Source) else images
    logits = class_logits(method, pool)
    nearest = logits.argmax(1)
    counts = torch.bincount(nearest, minlength=logits.shape[1])
    used = int((counts > 0).sum())
    shares = counts.sort(descending=True).values[:used].double() / len(pool)
    places = list(range(1, used + 1))
    title = "Share of the images by prototype, commonest first"
    figures = [curves({"share": (places, shares.tolist())}, x_label="prototype", y_label="share", title=title)]
    rows = {}
    pictures = method.pixels(pool).float()
    for number in counts.argsort(descending=True)[:PROTOTYPES].tolist():
        if counts[number] == 0:
            break
        # Those nearest to it, whether or not another prototype is nearer still: every row has as many.
        best = logits[:, number].argsort(descending=True)[: min(EXAMPLES, len(pool))]
        rows[f"prototype {number}: {int(counts[number])} images"] = pictures[best]
    figures.append(image_grid(rows, caption="The images nearest to the commonest prototypes."))
    text = (
        f"{used} of {logits.shape[1]:,} prototypes come first for any of {len(pool)} images; the commonest for "
        f"{float(shares[0]):.0%} of them."
    )
    return Section(title="Prototypes", text=text, figures=figures)


@torch.no_grad()
def class_logits(method: Dinov2Method, images: Tensor) -> Tensor:
    """Return the teacher's centred logits (n, K) of (n, C, H, W) uint8 images, on the CPU."""
    teacher, batches = method.model.teacher, []
    for chunk in images.split(32):
        inputs = normalize(method.pixels(chunk.to(method.device)), method.encoder)
        logits = teacher.dino_head(teacher.crops(inputs).classes).float()
        if method.config.centering == "centering":
            logits = logits - method.model.dino_centering.center
        batches.append(logits.cpu())
    return torch.cat(batches)
