"""What 200 class prompts cost: forward passes of Prompt-CAM on ViT-B/16 at 224 px against the plain encoder.

    python -m benchmarks.prompt_cam_speed [--classes 200] [--batch 4] [--rounds 5] [--write]

`whole row` is the same model with prompts and tokens in one row through timm's own blocks, as the published code has
it; its logits are compared with ours first.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.harness import alternate, machine, markdown_table, mean_and_deviation, paired_ratio, rewrite
from patchloom.encoders import create_encoder
from patchloom.encoders.insertion import plain
from patchloom.systems.prompt_cam.model import PromptCAM

PAGE = Path(__file__).parents[1] / "docs" / "systems" / "prompt_cam.md"


@torch.no_grad()
def whole_row(model: PromptCAM, images: Tensor) -> Tensor:
    """Return the logits by timm's blocks on prompts and tokens in one row."""
    encoder, added = model.encoder, model.added
    with plain(encoder):
        x = encoder._pos_embed(encoder.patch_embed(images))
        for number, block in enumerate(encoder.blocks):
            z = block(torch.cat([added.prompts[number].expand(len(x), -1, -1), x], dim=1))
            x = z[:, added.num_classes :]
        logits: Tensor = added.head(encoder.norm(z)[:, : added.num_classes])
    return logits


def main() -> None:
    """Time all in turn and print or write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, default=200)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", action="store_true", help="write the table to docs/systems/prompt_cam.md")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model = PromptCAM(create_encoder("vit_base_patch16_224"), options.classes).eval().to(device)
    images = torch.randn(options.batch, 3, 224, 224, device=device)

    def timed(call: Callable[[], object]) -> Callable[[], None]:
        @torch.no_grad()
        def run() -> None:
            call()
            if device == "cuda":
                torch.cuda.synchronize()

        return run

    def plain_forward() -> None:
        with plain(model.encoder):
            model.encoder(images)

    with torch.no_grad():
        difference = float((model(images) - whole_row(model, images)).abs().max())
    steps = {
        "plain encoder": timed(plain_forward),
        "Prompt-CAM, logits": timed(lambda: model(images)),
        "Prompt-CAM, logits and maps": timed(lambda: model.forward_with_attention(images)),
        "Prompt-CAM through the encoder itself (logits and tokens)": timed(lambda: model.encoder(images)),
        "whole row through timm's blocks": timed(lambda: whole_row(model, images)),
    }
    seconds = alternate(steps, rounds=options.rounds, warmup=1)
    rows = [
        [
            name,
            mean_and_deviation([1000 * s / options.batch for s in seconds[name]], 0),
            f"{paired_ratio(seconds[name], seconds['plain encoder']):.2f} ×",
        ]
        for name in steps
    ]
    text = (
        f"{machine()}, ViT-B/16, {options.classes} classes, 224 px, batch {options.batch}\n\n"
        + markdown_table(["forward pass", "ms per image", "against plain"], rows)
        + f"\n\nTarget: at most 1.5 ×. Largest difference of logits to the whole row: {difference:.1e}."
    )
    print(text)
    if options.write:
        rewrite(PAGE, "speed", text)


if __name__ == "__main__":
    main()
