"""Training VQ-KD: a tokenizer whose tokens hold what a teacher says of patches.

>>> import patchloom as pl
>>> run = pl.train_tokenizer("vq_kd", data="photos", teacher="runs/mae", out="runs/tokens")  # doctest: +SKIP
>>> run.summary["usage"], run.summary["teacher_distance"]  # doctest: +SKIP
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchloom.base.sizes import size_text
from patchloom.data import PairedViews
from patchloom.data.base import Source, StreamSource
from patchloom.data.reading import reading_options
from patchloom.data.sample import Transform
from patchloom.data.survey import notice
from patchloom.encoders import (
    Encoder,
    embed_dim,
    has_tokens,
    image_size,
    normalize,
    patch_size,
    plane_size,
    set_image_size,
)
from patchloom.errors import UsageError
from patchloom.models.bundle import read_lineage
from patchloom.models.published import fill
from patchloom.systems.beit.pictures import patches_by_code, token_colours
from patchloom.systems.beit.saved import KIND, VQKDTokenizer, load_network
from patchloom.systems.beit.vq_kd import VQKD, Distilled, cosine_distance, patch_features
from patchloom.systems.beit.vq_kd_config import VQKDConfig
from patchloom.systems.vit_vqgan.code_use import collapse_of, use_section
from patchloom.systems.vit_vqgan.saved import save_network
from patchloom.tokenizers.tokenizer import use_of
from patchloom.training.frozen import leave_out, put_back
from patchloom.training.held_out import hold_images_out, read_views
from patchloom.training.method import Method
from patchloom.training.optim import adamw, parameter_groups
from patchloom.training.teachers import FrozenTeacher, open_teacher

if TYPE_CHECKING:
    from patchloom.report import Section

SHOWN, SHOWN_CODES = 8, 10
ALIKE = 20
"""Patches of a code that are shown."""


class VQKDMethod(Method):
    """A tokenizer that is learned: codes of patches that say what a teacher's features of them are (VQ-KD).

    Attributes:
        teacher: The frozen teacher, set up for as many patches as there are tokens.
        held_out: Images it is measured on.
        measured: Figures on those.
        held_counts: (K,) how often each code occurs in them.
    """

    config_class = VQKDConfig
    config: VQKDConfig
    probed = False

    def __init__(self, config: VQKDConfig, source: Source | StreamSource) -> None:
        held_out = hold_images_out(source, config, config.val_images)
        super().__init__(config, held_out.learnt)
        self.held_out = held_out
        self._views: Tensor | None = None
        self.measured: dict[str, Any] = {}
        self.held_counts = torch.zeros(0)

    @property
    def network(self) -> VQKD:
        """What trains; it stands where other methods have their encoder."""
        return cast(VQKD, self.encoder)

    def build_encoder(self) -> Encoder:
        """Open the teacher and return the network, with the weights of another run where `init_from` names one.

        Raises:
            UsageError: They are of another size; or the teacher gives no features of patches.
        """
        config = self.config
        self.teacher, _ = open_teacher(config.teacher, channels=config.in_chans)
        model: Any = self.teacher.model
        if not has_tokens(model):
            raise UsageError(
                f"the teacher {config.teacher} is a {type(model).__name__}, which has no tokens of patches; take a ViT"
            )
        head = model.get_classifier() if config.teacher_head else None
        if config.teacher_head and not isinstance(head, nn.Linear):
            raise UsageError(f"the teacher {config.teacher} has no linear head; set teacher_head=false")
        network = VQKD.from_shapes(
            config.encoder,
            cast(Any, config.image_size),
            config.in_chans,
            decoder_layers=config.decoder_layers,
            code_dim=config.code_dim,
            num_codes=config.num_codes,
            teacher_dim=embed_dim(model) if head is None else head.out_features,
            beta=config.beta,
            decay=config.decay,
            kmeans_init=config.kmeans_init,
        )
        self._fit_teacher(model, network.grid)
        network.pretrained_cfg = {"input_size": (config.in_chans, *network.image_size)}
        if config.init_from is not None:
            fill(network, load_network(config.init_from)[0].state_dict())
        return cast(Encoder, network)

    def _fit_teacher(self, model: Encoder, grid: tuple[int, int]) -> None:
        """Set the teacher up for images of which it has as many patches as there are tokens."""
        size = (grid[0] * patch_size(model), grid[1] * patch_size(model))
        if (before := image_size(model)) == size:
            return
        h, w = plane_size(model, "VQ-KD")
        set_image_size(model, size)
        notice(
            f"the teacher sees images of {size_text(size)} pixels, for {grid[0]}x{grid[1]} patches as there are "
            f"tokens; it was made for {size_text(before)} and {h}x{w}, and its positions are resampled"
        )

    @property
    def input_size(self) -> tuple[int, int]:
        """Height and width of the training images in pixels."""
        return self.network.image_size

    def transform(self) -> Transform:
        """Return a random crop, mirrored or not."""
        return PairedViews(self.input_size, scale=self.config.crop_scale, flip=self.config.flip)

    @torch.no_grad()
    def teacher_features(self, images: Tensor) -> Tensor:
        """Return the teacher's features (B, N, T) of the patches of images (B, C, H, W) in [0, 1]."""
        teacher: FrozenTeacher = self.teacher
        size = image_size(teacher.model)
        if tuple(images.shape[-2:]) != size:
            images = F.interpolate(images, size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
        features = patch_features(teacher.model, normalize(images, teacher.model))
        if self.config.teacher_head:
            features = teacher.model.get_classifier()(features)
        return features

    def training_loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return the loss and its parts."""
        images = self.pixels(batch["image"])
        targets = self.teacher_features(images)
        self.network.quantize.follows = not self.repeating
        made: Distilled = self.encoder(images)
        distance = cosine_distance(made.features, targets)
        figures = {"teacher_distance": distance, "codebook": made.loss}
        with torch.no_grad():
            counts = torch.bincount(made.ids.flatten(), minlength=self.config.num_codes)
            shares = counts / counts.sum()
            figures["batch_perplexity"] = (-(shares * shares.clamp(min=1e-12).log()).sum()).exp()
        return {"loss": distance + made.loss, **figures}

    def configure_optimizers(self) -> Any:
        """Return AdamW; biases, norms, class tokens and positions do not decay, as published."""
        config = self.config
        groups = parameter_groups(self, decay=self.decays)
        return adamw(groups, betas=config.betas, eps=config.eps, fused=self.fused and config.precision != "16-mixed")

    # What is measured on held-out images.

    def held_out_views(self) -> Tensor:
        """Return the held-out images at the size of training, (n, C, H, W), read once."""
        if self._views is None:
            self._views = read_views(self.held_out.source, self.input_size)[0]
        return self._views

    @torch.no_grad()
    def validate(self, device: torch.device) -> dict[str, Any]:
        """Return how far from the teacher held-out images are, and the use of the codes; warn of a collapse."""
        if self.step == 0:
            return {}
        network = cast(VQKD, self.bundle_model())
        training = network.training
        network.eval()
        counts = torch.zeros(self.config.num_codes, dtype=torch.int64)
        images, total = self.held_out_views(), 0.0
        for part in images.split(self.config.batch_size):
            pixels = self.pixels(part.to(device))
            made = network(pixels)
            total += float(cosine_distance(made.features, self.teacher_features(pixels))) * len(part)
            counts += torch.bincount(made.ids.flatten().cpu(), minlength=len(counts))
        network.train(training)
        self.held_counts = counts
        self.measured = {"teacher_distance": total / len(images), **use_of(counts), "tokens": int(counts.sum())}
        if (warning := self.collapse()) is not None:
            notice(f"warning: {warning}")
        return dict(self.measured)

    def collapse(self) -> str | None:
        """Return a sentence where only few codes are in use, with what to change; None where all is well."""
        config = self.config
        changes = [] if config.kmeans_init else ["set kmeans_init=true"]
        changes += ["raise batch_size", f"lower code_dim (it is {config.code_dim})", "train longer, or lower num_codes"]
        return collapse_of(self.measured, config.num_codes, changes)

    def summary(self) -> dict[str, Any]:
        """Return what the tokenizer is, and whether its codes are in use."""
        network = cast(VQKD, self.bundle_model())
        made = {
            "num_codes": self.config.num_codes,
            "grid": list(network.grid),
            "patch_size": network.patch_size,
            "teacher": self.config.teacher,
            "measured_on": len(self.held_out_views()),
            "fingerprint": VQKDTokenizer(network).fingerprint(),
        }
        return made | ({"verdict": warning} if (warning := self.collapse()) else {})

    def lineage(self) -> dict[str, Any]:
        """Return who taught the tokenizer."""
        name = self.config.teacher
        lineage: dict[str, Any] = {}
        with suppress(UsageError):  # a timm name keeps none
            lineage = read_lineage(name)
        return {"teacher": {"path": name, "lineage": lineage}}

    def save_model(self, model: Encoder, path: Path, lineage: dict[str, Any]) -> None:
        """Write the tokenizer, without its teacher."""
        facts = {
            "image_size": list(self.input_size),
            "reading": reading_options(self.source),
            "encoder": self.config.encoder,
            "teacher": self.config.teacher,
            "data": self.config.data,
            "steps": self.step,
        }
        save_network(cast(VQKD, model), path, kind=KIND, facts=facts, lineage=lineage, overwrite=True)

    @torch.no_grad()
    def report_sections(self, images: Tensor) -> list[Section]:
        """Return tokens of held-out images, patches that share one, and how the codes are used."""
        from patchloom.report import Section, image_grid

        network = cast(VQKD, self.bundle_model()).eval()
        views = self.held_out_views()
        shown = views[:: max(1, len(views) // SHOWN)][:SHOWN]
        pixels = self.pixels(views)
        parts = pixels.split(self.config.batch_size)
        ids = torch.cat([network.encode_ids(part.to(self.device)).cpu() for part in parts]).view(-1, *network.grid)
        h, w = network.grid
        how = "images that were learned from" if not self.held_out.apart else "images that were not learned from"
        tokens = ids[:: max(1, len(views) // SHOWN)][:SHOWN]
        coloured = F.interpolate(token_colours(tokens), self.input_size, mode="nearest")
        sections = [
            Section(
                title="Images and tokens",
                text=f"Above, {how}; below, their {h}x{w} tokens. Each has a colour that means nothing: the same "
                f"colour is the same token.",
                figures=[image_grid({"image": self.pixels(shown).float().cpu(), "tokens": coloured})],
            )
        ]
        if alike := patches_by_code(pixels, ids, network.patch_size, SHOWN_CODES, ALIKE):
            sections.append(
                Section(
                    title="Patches that share a token",
                    text="A row is one code, from the most used to codes that occur twice.",
                    figures=[image_grid({f"code {code}": patches for code, patches in alike.items()}, tile=48)],
                )
            )
        if self.measured:
            distance = self.measured["teacher_distance"]
            quality = f"Between what is said and the teacher's features are {distance:.3f} (1 - cosine)."
            counted = f"{len(views)} {how}"
            sections.append(use_section(self.held_counts, self.measured, counted, quality, self.collapse()))
        return sections

    def describe(self) -> dict[str, Any]:
        """Return what the log and the report say about the network."""
        network = self.network
        h, w = network.grid
        return {
            "encoder": f"{self.config.encoder}, {h}x{w} tokens of {self.config.num_codes} codes",
            "width": embed_dim(network.encoder),
            "depth": len(network.encoder.blocks),
            "parameters": sum(parameter.numel() for parameter in network.parameters()),
            "trained_parameters": sum(p.numel() for p in self.parameters() if p.requires_grad),
            "teacher_parameters": sum(p.numel() for p in self.teacher.parameters()),
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        leave_out(checkpoint, "teacher", self.teacher)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        put_back(checkpoint, "teacher", self.teacher, f"the teacher {self.config.teacher}")
