"""Training ViT-VQGAN: an auto-encoder with a table of codes, and a discriminator it has to deceive.

>>> import patchloom as pl
>>> run = pl.train_tokenizer("vit_vqgan", data="photos", out="runs/tokens", image_size=64)  # doctest: +SKIP
>>> run.summary["usage"], run.summary["psnr"]  # doctest: +SKIP
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from patchloom.base.sizes import pair
from patchloom.data import PairedViews
from patchloom.data.base import Source, StreamSource
from patchloom.data.reading import reading_options
from patchloom.data.sample import Transform
from patchloom.data.survey import notice
from patchloom.encoders import Encoder
from patchloom.errors import UsageError
from patchloom.models.published import fill
from patchloom.systems.vit_vqgan.code_use import collapse_of, use_section
from patchloom.systems.vit_vqgan.config import SIZES, ViTVQGANConfig
from patchloom.systems.vit_vqgan.discriminator import StyleGANDiscriminator, group_of
from patchloom.systems.vit_vqgan.losses import (
    PerceptualLoss,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
    logit_laplace_loss,
    r1_penalty,
    vgg_weights,
)
from patchloom.systems.vit_vqgan.model import Reconstruction, ViTVQGAN
from patchloom.systems.vit_vqgan.saved import LearnedTokenizer, load_network, save_network
from patchloom.tokenizers.tokenizer import use_of
from patchloom.training.frozen import leave_out, put_back
from patchloom.training.held_out import hold_images_out, read_views
from patchloom.training.method import Method
from patchloom.training.optim import adamw, parameter_groups
from patchloom.training.phases import Phase

if TYPE_CHECKING:
    from patchloom.report import Section

PERCEPTUAL = 0.1
"""Weight of the perceptual distance where its weights are on hand (paper)."""
SHOWN = 8
MADE = "reconstruction"


class ViTVQGANMethod(Method):
    """A tokenizer that is learned: a ViT to codes of a table, another back, against a discriminator (ViT-VQGAN).

    Attributes:
        held_out: Images it is measured on.
        measured: Figures on those, and how often each code occurs in them.
    """

    config_class = ViTVQGANConfig
    config: ViTVQGANConfig
    probed = False
    code_counts: Tensor

    def __init__(self, config: ViTVQGANConfig, source: Source | StreamSource) -> None:
        held_out = hold_images_out(source, config, config.val_images)
        super().__init__(config, held_out.learnt)
        self._latents: Tensor | None = None
        self.held_out = held_out
        self._views: Tensor | None = None
        self.measured: dict[str, Any] = {}
        self.held_counts = torch.zeros(0)
        if config.discriminates:
            group_of(config.batch_size)
            channels = None
            if config.disc_channels is not None:
                whole = StyleGANDiscriminator.channels_of(self.input_size[0])
                channels = [min(count, config.disc_channels) for count in whole]
            self.discriminator = StyleGANDiscriminator(self.input_size[0], channels=channels, in_chans=config.in_chans)
        self.perceptual, self.perceptual_loss = self._perceptual()
        if not config.l2 + config.l1 + config.logit_laplace + self.perceptual:
            raise UsageError(
                "nothing is reconstructed: l2, l1 and logit_laplace are 0, and there is no perceptual loss"
            )
        # How often each code was used since the last look; part of checkpoints.
        self.register_buffer("code_counts", torch.zeros(config.num_codes, dtype=torch.int64))

    @property
    def network(self) -> ViTVQGAN:
        """What trains; it stands where other methods have their encoder."""
        return cast(ViTVQGAN, self.encoder)

    def _perceptual(self) -> tuple[float, PerceptualLoss | None]:
        """Return the weight of the perceptual distance and what measures it; say aloud where it is left out."""
        config = self.config
        if config.perceptual == 0 or (config.perceptual is None and config.in_chans != 3):
            return 0.0, None
        found = vgg_weights(config.perceptual_weights)
        if found is None and config.perceptual is not None:
            raise UsageError(
                "perceptual needs VGG-16's ImageNet weights, and there are none here (nothing is downloaded): give "
                "their file as perceptual_weights (torchvision's vgg16-397923af.pth), or set perceptual=0"
            )
        if found is None:
            notice("no weights of VGG-16 here: the perceptual loss is left out; perceptual_weights names their file")
            return 0.0, None
        return PERCEPTUAL if config.perceptual is None else config.perceptual, PerceptualLoss(found)

    def build_encoder(self) -> Encoder:
        """Return the auto-encoder, with the weights of another run where `init_from` names one.

        Raises:
            UsageError: They are of another size.
        """
        config = self.config
        network = ViTVQGAN(
            config.image_size,
            config.patch_size,
            SIZES[config.encoder],
            SIZES[config.decoder or config.encoder],
            config.num_codes,
            config.code_dim,
            config.in_chans,
            with_scale=config.logit_laplace > 0,
            beta=config.beta,
            l2_normalize=config.l2_normalize,
            num_residual=config.num_residual,
            detach_residual=config.detach_residual,
            kind=config.quantizer,
            temperature=config.temperature,
        )
        if config.init_from is not None:
            fill(network, load_network(config.init_from)[0].state_dict())
        encoder = cast(Encoder, network)
        encoder.pretrained_cfg = {"input_size": (config.in_chans, *pair(config.image_size))}
        return encoder

    @property
    def input_size(self) -> tuple[int, int]:
        """Height and width of the training images in pixels."""
        return pair(self.config.image_size)

    def transform(self) -> Transform:
        """Return a random crop, mirrored or not."""
        config = self.config
        ratio = (1.0, 1.0)
        return PairedViews(self.input_size, scale=config.crop_scale, ratio=ratio, flip=config.flip)

    # One step: first the auto-encoder, then the discriminator, on what the auto-encoder made.

    def phases(self) -> list[Phase]:
        """Return generator and discriminator; none where there is no discriminator."""
        if not self.config.discriminates:
            return []
        return [
            Phase("generator", ("encoder",), self.training_loss),
            Phase("discriminator", ("discriminator",), self.critic_loss, start=self.config.disc_start),
        ]

    def training_loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return the loss of the auto-encoder and its parts."""
        config = self.config
        images = self.pixels(batch["image"])
        made: Reconstruction = self.encoder(images)
        pictures = made.images if config.logit_laplace == 0 else self.network.pictures(made.images)
        losses = self.reconstruction_losses(images, made.images, pictures)
        weights = {"l2": config.l2, "l1": config.l1, "logit_laplace": config.logit_laplace}
        weights["perceptual"] = self.perceptual
        reconstruction = torch.stack([weights[name] * value for name, value in losses.items()]).sum()
        total = reconstruction + made.loss
        figures = {"reconstruction_error": losses["l2"], "codebook": made.loss}
        figures |= {name: value for name, value in losses.items() if name in ("perceptual", "logit_laplace", "l1")}
        if config.discriminates and self.step >= config.disc_start:
            deceived = generator_loss(self.discriminator(pictures), config.adversarial_loss)
            factor: Tensor | float = 1.0
            if config.adaptive_weight:
                factor = adaptive_weight(reconstruction, deceived, self.network.decoder.proj.weight)
                figures["adversarial_factor"] = factor
            total = total + config.adversarial * factor * deceived
            figures["adversarial"] = deceived
        if config.discriminates:
            batch[MADE] = pictures.detach()
        if config.revive_every:
            self._latents = made.latents.detach().flatten(0, 1)
        with torch.no_grad():
            counts = torch.bincount(made.ids.flatten(), minlength=config.num_codes)
            if not self.repeating and self.training:
                self.code_counts += counts
            shares = counts / counts.sum()
            figures["batch_perplexity"] = (-(shares * shares.clamp(min=1e-12).log()).sum()).exp()
        return {"loss": total, **figures}

    def reconstruction_losses(self, images: Tensor, output: Tensor, pictures: Tensor) -> dict[str, Tensor]:
        """Return the terms that compare images with what was made of them; squared error always, for the log."""
        config = self.config
        away = pictures - images
        losses = {"l2": away.square().mean()}
        if config.l1:
            losses["l1"] = away.abs().mean()
        if config.logit_laplace:
            losses["logit_laplace"] = logit_laplace_loss(output, images)
        if self.perceptual_loss is not None:
            losses["perceptual"] = self.perceptual_loss(images, pictures)
        return losses

    def critic_loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return the loss of the discriminator on real images and on those of the generator's turn."""
        config = self.config
        images = self.pixels(batch["image"])
        made = batch.pop(MADE, None)
        if made is None:
            with torch.no_grad():
                made = self.network.pictures(self.encoder(images).images)
        real, fake = self.discriminator(images), self.discriminator(made)
        total = discriminator_loss(real, fake, config.adversarial_loss)
        figures = {"real": real.mean(), "fake": fake.mean()}
        if config.r1 and self.step % config.r1_every == 0:
            penalty = r1_penalty(self.discriminator, images)
            total = total + config.r1 / 2 * config.r1_every * penalty
            figures["r1"] = penalty
        return {"loss": total, **figures}

    def configure_optimizers(self) -> Any:
        """Return AdamW for each phase; everything that is learned decays, the codes among it, as published."""
        config = self.config
        phases = self.phases() or [Phase("generator", ("encoder",), self.training_loss)]
        found = [
            adamw(
                parameter_groups(self, decay=lambda name, parameter: True, select=phase.trains),
                betas=config.betas,
                eps=config.eps,
                fused=config.precision != "16-mixed",
            )
            for phase in phases
        ]
        return found if self.phases() else found[0]

    def after_step(self) -> None:
        """Let codes that nothing uses start again, where that is asked for."""
        every = self.config.revive_every
        if every and (self.step + 1) % every == 0:
            self.revive()

    @torch.no_grad()
    def revive(self) -> int:
        """Put codes that were not used since the last time where patches of the last batch are; return how many."""
        dead = (self.code_counts == 0).nonzero().flatten()
        self.code_counts.zero_()
        if len(dead) and self._latents is not None:
            chosen = torch.randint(len(self._latents), (len(dead),), device=self._latents.device)
            table = self.network.quantizer.embedding.weight
            table[dead] = self._latents[chosen].to(table)
        return len(dead)

    # What is measured on held-out images.

    def held_out_views(self) -> Tensor:
        """Return the held-out images at the size of training, (n, C, H, W), read once."""
        if self._views is None:
            self._views = read_views(self.held_out.source, self.input_size)[0]
        return self._views

    @torch.no_grad()
    def validate(self, device: torch.device) -> dict[str, Any]:
        """Return reconstruction error and use of the codes on held-out images; warn of a collapse."""
        if self.step == 0:
            return {}
        network = cast(ViTVQGAN, self.bundle_model())
        training = network.training
        network.eval()
        images = self.held_out_views()
        counts = torch.zeros(self.config.num_codes, dtype=torch.int64)
        error = 0.0
        for part in images.split(self.config.batch_size):
            pixels = self.pixels(part.to(device))
            made = network(pixels)
            error += float((network.pictures(made.images) - pixels).double().square().sum())
            counts += torch.bincount(made.ids.flatten().cpu(), minlength=len(counts))
        network.train(training)
        mse = error / images.numel()
        used = use_of(counts)
        tokens = int(counts.sum())
        self.held_counts = counts
        self.measured = {"mse": mse, "psnr": float(-10 * np.log10(max(mse, 1e-20))), **used, "tokens": tokens}
        if (warning := self.collapse()) is not None:
            notice(f"warning: {warning}")
        return dict(self.measured)

    def collapse(self) -> str | None:
        """Return a sentence where only few codes are in use, with what to change; None where all is well."""
        config, changes = self.config, []
        if not config.l2_normalize:
            changes.append("set l2_normalize=true")
        if config.code_dim > 16:
            changes.append(f"lower code_dim (it is {config.code_dim}; 8 to 16 use codes best)")
        if not config.revive_every:
            changes.append("let unused codes start again (--revive_every 100)")
        changes.append("train longer, or lower num_codes")
        return collapse_of(self.measured, config.num_codes, changes)

    def summary(self) -> dict[str, Any]:
        """Return what the tokenizer is, and whether its codes are in use."""
        grid = self.network.grid_of(self.input_size)
        made = {"num_codes": self.config.num_codes, "grid": list(grid), "patch_size": self.config.patch_size}
        made |= {"perceptual": self.perceptual, "measured_on": len(self.held_out_views())}
        if self.config.num_residual == 1:
            made["fingerprint"] = LearnedTokenizer(cast(ViTVQGAN, self.bundle_model())).fingerprint()
        return made | ({"verdict": warning} if (warning := self.collapse()) else {})

    def save_model(self, model: Encoder, path: Path, lineage: dict[str, Any]) -> None:
        """Write the tokenizer, without the discriminator."""
        facts = {
            "image_size": list(self.input_size),
            "reading": reading_options(self.source),
            "encoder": self.config.encoder,
            "data": self.config.data,
            "steps": self.step,
        }
        save_network(cast(ViTVQGAN, model), path, facts=facts, lineage=lineage, overwrite=True)

    @torch.no_grad()
    def report_sections(self, images: Tensor) -> list[Section]:
        """Return reconstructions of held-out images, and how the codes are used."""
        from patchloom.report import Section, image_grid

        network = cast(ViTVQGAN, self.bundle_model()).eval()
        views = self.held_out_views()
        shown = views[:: max(1, len(views) // SHOWN)][:SHOWN]
        pixels = self.pixels(shown.to(self.device))
        pictures = network.pictures(network(pixels).images)
        h, w = network.grid_of(self.input_size)
        how = "images that were learned from" if not self.held_out.apart else "images that were not learned from"
        first = Section(
            title="Input and reconstruction",
            text=f"Above, {how}; below, what is made of their {h}x{w} tokens.",
            figures=[image_grid({"input": pixels.float().cpu(), "reconstruction": pictures.float().cpu()})],
        )
        if not self.measured:
            return [first]
        found = self.measured
        quality = f"PSNR {found['psnr']:.2f} dB, squared error {found['mse']:.5f}."
        return [first, use_section(self.held_counts, found, f"{len(views)} {how}", quality, self.collapse())]

    def describe(self) -> dict[str, Any]:
        """Return what the log and the report say about the network."""
        network, size = self.network, SIZES[self.config.encoder]
        count = sum(parameter.numel() for parameter in network.parameters())
        both = (
            self.config.encoder if self.config.decoder is None else f"{self.config.encoder} and {self.config.decoder}"
        )
        h, w = network.grid_of(self.input_size)
        return {
            "encoder": f"{both}, {h}x{w} tokens of {self.config.num_codes} codes",
            "width": size.dim,
            "depth": size.depth,
            "parameters": count,
            "trained_parameters": sum(p.numel() for p in self.parameters() if p.requires_grad),
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if self.perceptual_loss is not None:
            leave_out(checkpoint, "perceptual_loss", self.perceptual_loss)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if self.perceptual_loss is not None:
            where = str(self.config.perceptual_weights or "torchvision's cache")
            put_back(checkpoint, "perceptual_loss", self.perceptual_loss, where)
