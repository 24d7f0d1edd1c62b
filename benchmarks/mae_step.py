"""A training step of MAE ViT-B/16 at 224 px against transformers' ViTMAE and lightly's MAE, of equal sizes.

    python -m benchmarks.mae_step [--batch 16] [--rounds 5] [--write]

All: mask 75 %, decoder of 8 blocks of width 512, targets normalised per patch; forward, backward, fused AdamW. Beside
them two steps without masking: of the encoder alone, and of encoder and decoder. The arithmetic is counted, too.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.harness import alternate, machine, markdown_table, mean_and_deviation, paired_ratio, rewrite

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
SIDE, PATCH, PATCHES, RATIO = 224, 16, 196, 0.75
WIDTH, DEPTH, HEADS = 768, 12, 12
DECODER = {"decoder_dim": 512, "decoder_depth": 8, "decoder_heads": 16}
Step = Callable[[], None]


def pictures(batch: int, device: str) -> Tensor:
    """Return normalised images."""
    return torch.randn(batch, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)).to(device)


def stepper(model: nn.Module, loss: Callable[[], Tensor], device: str, precision: str) -> Step:
    """Return forward, backward and optimiser step of a model."""
    model.to(device).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, betas=(0.9, 0.95), weight_decay=0.05, fused=True)

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            value = loss()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()

    return step


def ours(batch: int, device: str, precision: str) -> Step:
    """Return one training step of ours."""
    from patchloom.encoders import create_encoder
    from patchloom.encoders.masked_autoencoder import MaskedAutoencoder, initialize_as_mae

    images = pictures(batch, device)
    encoder = create_encoder("vit_base_patch16_224")
    initialize_as_mae(encoder)
    model = MaskedAutoencoder(encoder, **DECODER)
    return stepper(
        model, lambda: model.loss(images, RATIO, torch.rand(batch, PATCHES, device=device)), device, precision
    )


def transformers_mae(batch: int, device: str, precision: str) -> Step:
    """Return one training step of transformers' `ViTMAEForPreTraining`."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    images = pictures(batch, device)
    config = ViTMAEConfig(mask_ratio=RATIO, norm_pix_loss=True)
    model = ViTMAEForPreTraining._from_config(config, attn_implementation="sdpa")
    return stepper(model, lambda: model(pixel_values=images).loss, device, precision)


def lightly_mae(batch: int, device: str, precision: str) -> Step:
    """Return one training step of MAE put together from lightly's parts, as its documentation does."""
    import timm
    from lightly.models import utils
    from lightly.models.modules import MaskedVisionTransformerDecoderTIMM, MaskedVisionTransformerTIMM

    class MAE(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = MaskedVisionTransformerTIMM(vit=timm.create_model("vit_base_patch16_224", num_classes=0))
            self.embed = nn.Linear(WIDTH, 512)
            self.decoder = MaskedVisionTransformerDecoderTIMM(num_patches=PATCHES, embed_dim=512, depth=8, num_heads=16)
            self.predict = nn.Linear(512, 3 * PATCH**2)

        def forward(self, images: Tensor) -> Tensor:
            length = self.backbone.sequence_length
            keep, hidden = utils.random_token_mask((len(images), length), mask_ratio=RATIO, device=images.device)
            encoded = self.embed(self.backbone.encode(images=images, idx_keep=keep))
            tokens = utils.repeat_token(self.decoder.mask_token, (len(images), length))
            tokens = utils.set_at_index(tokens, keep, encoded.type_as(tokens))
            said = self.predict(utils.get_at_index(self.decoder(tokens), hidden))
            targets = utils.get_at_index(utils.patchify(images, PATCH), hidden - 1)
            return F.mse_loss(said.float(), utils.normalize_mean_var(targets, dim=-1))

    images, model = pictures(batch, device), MAE()
    return stepper(model, lambda: model(images), device, precision)


def unmasked_encoder(batch: int, device: str, precision: str) -> Step:
    """Return one step of the encoder alone on all patches."""
    from patchloom.encoders import create_encoder

    images, encoder = pictures(batch, device), create_encoder("vit_base_patch16_224")
    return stepper(encoder, lambda: encoder.forward_features(images).square().mean(), device, precision)


def unmasked_whole(batch: int, device: str, precision: str) -> Step:
    """Return one step of encoder and decoder on all patches: what MAE would cost without dropping any."""
    from patchloom.encoders import create_encoder
    from patchloom.encoders.masked_autoencoder import MaskedAutoencoder

    images = pictures(batch, device)
    model = MaskedAutoencoder(create_encoder("vit_base_patch16_224"), **DECODER)
    order = torch.arange(PATCHES, device=device).expand(batch, -1)

    def loss() -> Tensor:
        latent = model.encoder.forward_features(images)
        return model.loss_of(images, model.decode(latent, order), torch.ones_like(order, dtype=torch.float32))

    return stepper(model, loss, device, precision)


CANDIDATES = {
    "ours": ours,
    "transformers": transformers_mae,
    "lightly": lightly_mae,
    "unmasked encoder": unmasked_encoder,
    "unmasked encoder and decoder": unmasked_whole,
}


def multiply_adds(tokens: int, width: int, depth: int) -> float:
    """Return the multiply-adds of blocks, forward, in billions: projections, MLP and attention."""
    return depth * (12 * tokens * width**2 + 2 * tokens**2 * width) / 1e9


def arithmetic() -> dict[str, float]:
    """Return the multiply-adds of one image, forward, in billions."""
    visible = int(PATCHES * (1 - RATIO)) + 1
    decoder = multiply_adds(PATCHES + 1, 512, 8) + 147 * 512 * 768 / 1e9
    embedding = PATCHES * WIDTH * 768 / 1e9
    whole = multiply_adds(PATCHES + 1, WIDTH, DEPTH) + embedding
    return {
        "mae": multiply_adds(visible, WIDTH, DEPTH) + decoder + embedding / 4,
        "unmasked encoder": whole,
        "unmasked encoder and decoder": whole + decoder,
    }


def main() -> None:
    """Time all in turn and print or write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--only", nargs="+", choices=list(CANDIDATES), default=list(CANDIDATES))
    parser.add_argument("--write", action="store_true", help="write the table to docs/performance.md")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def timed(call: Step) -> Step:
        def run() -> None:
            call()
            if device == "cuda":
                torch.cuda.synchronize()

        return run

    steps = {name: timed(CANDIDATES[name](options.batch, device, options.precision)) for name in options.only}
    seconds = alternate(steps, rounds=options.rounds, warmup=1 if device == "cpu" else 5)
    counted = arithmetic()
    rows = []
    for name in options.only:
        faster = paired_ratio(seconds[name], seconds["ours"]) if "ours" in seconds else float("nan")
        work = f"{counted[name] / counted['mae']:.2f} ×" if name in counted else "1"
        speed = mean_and_deviation([options.batch / s for s in seconds[name]], 1)
        rows.append([name, speed, "1" if name == "ours" else f"{faster:.2f} ×", work])
    header = [
        f"step, batch {options.batch}, {options.precision}",
        "images/s",
        "ours is faster by",
        "its arithmetic over ours",
    ]
    text = (
        f"{machine()}\n\n{markdown_table(header, rows)}\n\n"
        f"Target: at least 1.1 × the faster of transformers and lightly; at least 2.2 × an unmasked step."
    )
    print(text)
    if options.write:
        rewrite(PAGE, "mae_step", text)


if __name__ == "__main__":
    main()
