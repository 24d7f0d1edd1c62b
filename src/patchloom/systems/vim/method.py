"""Training VIM: the tokens of images, each from those before it.

>>> import patchloom as pl
>>> run = pl.generate("vim", tokenizer="runs/tokens", data="photos", out="runs/vim")  # doctest: +SKIP
>>> pl.load(run.model).sample(4).shape  # doctest: +SKIP
torch.Size([4, 3, 64, 64])
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchloom.base.sizes import compact, pair, size_text
from patchloom.data import PairedViews, SubsetSource
from patchloom.data.base import Source, StreamSource, no_labels
from patchloom.data.reading import reading_options
from patchloom.data.sample import Transform
from patchloom.data.survey import notice
from patchloom.encoders import Encoder
from patchloom.errors import UsageError
from patchloom.models.published import fill
from patchloom.systems.vim.config import SIZES, VIMConfig
from patchloom.systems.vim.model import ImageGPT, check_sampling
from patchloom.systems.vim.saved import VIM, load_vim, save_vim
from patchloom.tokenizers.tokenizer import Tokenizer, find_learned, keep_tokenizer, open_tokenizer
from patchloom.training.frozen import leave_out, put_back
from patchloom.training.held_out import hold_images_out, read_views
from patchloom.training.inputs import open_training_images
from patchloom.training.method import Method
from patchloom.training.optim import adamw, parameter_groups

if TYPE_CHECKING:
    from patchloom.report import Section

SIDE = 224
"""Of images where neither settings nor tokenizer say."""
SHOWN = 8


class VIMMethod(Method):
    """Images made token by token: a causal transformer over the tokens of any tokenizer (VIM).

    Attributes:
        tokenizer: What makes tokens; frozen.
        grid: Tokens of an image, (h, w).
        held_out: Images it is measured on.
    """

    config_class = VIMConfig
    config: VIMConfig
    probed = False
    token_counts: Tensor

    def __init__(self, config: VIMConfig, source: Source | StreamSource) -> None:
        names = source.class_names
        if config.conditional:
            if names is None or source.multilabel:
                raise no_labels(source, "conditional=true needs one label an image, and ")
            if isinstance(source, Source) and not source.labelled().all():
                source = SubsetSource(source, np.flatnonzero(source.labelled()))
        held_out = hold_images_out(source, config, config.val_images)
        super().__init__(config, held_out.learnt)
        self.held_out = held_out
        self._ids: tuple[Tensor, Tensor] | None = None
        self.measured: dict[str, float] = {}
        check_sampling(self.tokenizer.num_codes, config.temperature, config.top_k, config.top_p)
        if config.samples and not self.tokenizer.decodes:
            raise UsageError(f"{config.tokenizer} makes no images of tokens; set samples=0 to learn features alone")
        # How often each code was learned, for what guessing by frequency alone would give; part of checkpoints.
        self.register_buffer("token_counts", torch.zeros(self.tokenizer.num_codes, dtype=torch.int64))

    @classmethod
    def open_data(cls, config: Any) -> tuple[Source | StreamSource, Any]:
        """Return the images, read as those the tokenizer was made on, and the settings with their size."""
        tokenizer = open_tokenizer(_of_run(config))
        settled: dict[str, Any] = {}
        if config.image_size is None:
            known = tokenizer.facts.get("image_size")
            size = compact(pair(tuple(known) if isinstance(known, list) else known or SIDE))
            h, w = tokenizer.grid_size(size)
            notice(f"images of {size_text(size)} pixels, as the tokenizer was made for: {h}x{w} tokens")
            settled["image_size"] = size
        if tokenizer.in_chans != config.in_chans:
            notice(
                f"{config.tokenizer} takes {tokenizer.in_chans} channels, so images are read as {tokenizer.in_chans}"
            )
            settled["in_chans"] = tokenizer.in_chans
        fitted = (tokenizer.facts.get("reading") or {}).get("value_range", "auto")
        if config.value_range == "auto" and fitted != "auto":
            settled["value_range"] = fitted
        return open_training_images(dataclasses.replace(config, **settled))

    @property
    def transformer(self) -> ImageGPT:
        """What trains; it stands where other methods have their encoder."""
        return cast(ImageGPT, self.encoder)

    def build_encoder(self) -> Encoder:
        """Open the tokenizer and return the transformer, with the weights of another run where `init_from` names one.

        Raises:
            UsageError: They are of another size, or for other tokens; or the tokenizer does not fit the images.
        """
        config, size = self.config, SIZES[self.config.encoder]
        self.tokenizer: Tokenizer = open_tokenizer(_of_run(config))
        self.tokenizer.check_fits(self.tokenizer.patch_size, config.in_chans)
        self.grid = self.tokenizer.grid_size(self.input_size)
        self.class_names = list(self.source.class_names or []) if config.conditional else None
        transformer = ImageGPT(
            self.tokenizer.num_codes,
            self.grid[0] * self.grid[1],
            size.dim,
            size.depth,
            size.heads,
            None if self.class_names is None else len(self.class_names),
            token_shift=config.token_shift,
            mlp=config.mlp,
            dropout=config.dropout,
        )
        if config.init_from is not None:
            fill(transformer, load_vim(config.init_from).transformer.state_dict())
        encoder = cast(Encoder, transformer)
        encoder.pretrained_cfg = {"input_size": (config.in_chans, *self.input_size)}
        return encoder

    @property
    def input_size(self) -> tuple[int, int]:
        """Height and width of the training images in pixels."""
        return pair(self.config.image_size or SIDE)

    def prepare(self, source: Source | StreamSource, run_dir: Path) -> None:
        """Keep the tokenizer in the run."""
        keep_tokenizer(self.tokenizer, run_dir)

    def transform(self) -> Transform:
        """Return a random crop, mirrored or not."""
        return PairedViews(self.input_size, scale=self.config.crop_scale, ratio=(1.0, 1.0), flip=self.config.flip)

    def training_loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return the mean cross-entropy of all tokens in nats, and the share that is the likeliest."""
        ids = self.tokenizer.encode(self.pixels(batch["image"])).flatten(1)
        if self.training and not self.repeating:
            self.token_counts += torch.bincount(ids.flatten(), minlength=len(self.token_counts))
        logits = self.encoder(ids, self._conditions(batch["label"]) if self.config.conditional else None)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), ids.flatten())
        return {"loss": loss, "token_accuracy": (logits.argmax(-1) == ids).float().mean()}

    def _conditions(self, labels: Tensor) -> Tensor:
        return labels.view(-1, 1)

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        """Return whether weight decay applies: to the weights of linear layers, as published."""
        return name.endswith(".weight") and parameter.ndim == 2 and "_embed." not in name

    def configure_optimizers(self) -> Any:
        """Return AdamW."""
        config = self.config
        groups = parameter_groups(self, decay=self.decays)
        return adamw(groups, betas=config.betas, eps=config.eps, fused=config.precision != "16-mixed")

    @torch.no_grad()
    def validate(self, device: torch.device) -> dict[str, Any]:
        """Return the cross-entropy of held-out images, and what their tokens' frequencies alone would give."""
        if self.step == 0:
            return {}
        if self._ids is None:
            images, labels = read_views(self.held_out.source, self.input_size)
            self._ids = self.tokenizer.encode(self.pixels(images)).flatten(1).cpu(), labels
        transformer = cast(ImageGPT, self.bundle_model())
        training = transformer.training
        transformer.eval()
        total = right = 0.0
        for ids, labels in zip(*(part.split(self.config.batch_size) for part in self._ids), strict=True):
            ids = ids.to(device)
            cond = self._conditions(labels).to(device) if self.config.conditional else None
            logits = transformer(ids, cond).float()
            total += float(F.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="sum"))
            right += float((logits.argmax(-1) == ids).sum())
        transformer.train(training)
        count = self._ids[0].numel()
        shares = (self.token_counts.double().cpu() + 1) / float(self.token_counts.sum() + len(self.token_counts))
        by_frequency = float(-shares[self._ids[0].flatten()].log().mean())
        self.measured = {
            "held_out_cross_entropy": total / count,
            "frequency_cross_entropy": by_frequency,
            "held_out_token_accuracy": right / count,
        }
        return dict(self.measured)

    def model_of(self, transformer: nn.Module) -> VIM:
        """Return the whole, around a transformer."""
        reading = reading_options(self.source)
        return VIM(cast(ImageGPT, transformer), self.tokenizer, self.grid, self.class_names, reading)

    def save_model(self, model: Encoder, path: Path, lineage: dict[str, Any]) -> None:
        """Write the transformer with its tokenizer."""
        save_vim(self.model_of(model), path, lineage)

    def lineage(self) -> dict[str, Any]:
        """Return which tokenizer it is."""
        return {"tokenizer": {"path": self.config.tokenizer, "fingerprint": self.tokenizer.fingerprint()}}

    def summary(self) -> dict[str, Any]:
        """Return what is modelled."""
        return {
            "grid": list(self.grid),
            "num_codes": self.tokenizer.num_codes,
            "tokenizer_fingerprint": self.tokenizer.fingerprint(),
            "classes": None if self.class_names is None else len(self.class_names),
        }

    @torch.no_grad()
    def report_sections(self, images: Tensor) -> list[Section]:
        """Return images drawn, and held-out images through the tokenizer: the most that can be reached."""
        from patchloom.report import Section, image_grid

        config, sections = self.config, []
        if config.samples:
            model = self.model_of(self.bundle_model()).eval()
            sampling: dict[str, Any] = {"temperature": config.temperature, "top_k": config.top_k, "top_p": config.top_p}
            drawn = model.sample(config.samples, seed=config.seed, **sampling).float().cpu()
            if self.class_names is None:
                rows = {f"drawn {n + 1}": part for n, part in enumerate(_rows(drawn))}
            else:
                rows = {
                    name: drawn[number :: len(self.class_names)]
                    for number, name in enumerate(self.class_names[: config.samples])
                }
            told = ", ".join(f"{name} {value:g}" for name, value in sampling.items() if value is not None)
            text = f"{config.samples} images drawn token by token ({told}), none chosen."
            sections.append(Section(title="Images drawn", text=text, figures=[image_grid(_even(rows))]))
        if self.tokenizer.decodes:
            views, _ = read_views(
                SubsetSource(self.held_out.source, _spread(len(self.held_out.source))), self.input_size
            )
            pixels = self.pixels(views)
            through = self.tokenizer.decode(self.tokenizer.encode(pixels)).clamp(0, 1).cpu()
            text = "Real images, and what the tokenizer makes of them: nothing drawn can be sharper than that."
            figure = image_grid({"real": pixels.float(), "through the tokenizer": through})
            sections.append(Section(title="What the tokenizer gives", text=text, figures=[figure]))
        if self.measured:
            found = self.measured
            text = (
                f"Cross-entropy of held-out tokens: {found['held_out_cross_entropy']:.3f} nats; "
                f"{found['frequency_cross_entropy']:.3f} by how often each code occurs alone, "
                f"{float(np.log(self.tokenizer.num_codes)):.3f} if all were alike."
            )
            sections.append(Section(title="How well tokens are foretold", text=text))
        return sections

    def describe(self) -> dict[str, Any]:
        """Return what the log and the report say about the transformer."""
        size = SIZES[self.config.encoder]
        count = sum(parameter.numel() for parameter in self.encoder.parameters())
        h, w = self.grid
        return {
            "encoder": f"{self.config.encoder} on {h}x{w} tokens of {self.tokenizer.num_codes} codes",
            "width": size.dim,
            "depth": size.depth,
            "parameters": count,
            "trained_parameters": count,
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        leave_out(checkpoint, "tokenizer", self.tokenizer)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        put_back(checkpoint, "tokenizer", self.tokenizer, self.config.tokenizer)


def _of_run(config: VIMConfig) -> str:
    """Return where the tokenizer lies: in the run, where it is gone on with, else where the settings say."""
    kept = Path(config.out)
    if config.resume and (find_learned(kept) is not None or (kept / "codebook.safetensors").exists()):
        return str(kept)
    return config.tokenizer


def _spread(count: int) -> np.ndarray:
    return np.unique(np.linspace(0, count - 1, min(SHOWN, count)).round().astype(int))


def _rows(images: Tensor) -> list[Tensor]:
    return list(images.split(SHOWN))


def _even(rows: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return rows of one length: shorter ones are filled with white."""
    most = max(len(row) for row in rows.values())
    return {
        name: torch.cat([row, torch.ones(most - len(row), *row.shape[1:])]) if len(row) < most else row
        for name, row in rows.items()
    }
