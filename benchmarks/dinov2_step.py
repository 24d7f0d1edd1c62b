"""A training step of DINOv2 with ViT-S/16 against one put together from lightly's building blocks, of equal size.

    python -m benchmarks.dinov2_step [--batch 4] [--rounds 3] [--drop_path 0.3] [--write]

Two global crops of 224 pixels and eight local ones of 96 for each image, half of the global crops masked, one head of
65 536 prototypes for class and patch tokens. Both: student and teacher forward, DINO, iBOT and KoLeo losses, backward,
clipping, fused AdamW, moving average. Peak memory is that of a process of its own. Ours leaves the samples that drop
path takes out of a branch out of its computation; lightly computes and drops them: with `--drop_path 0` both compute
the same.
"""

from __future__ import annotations

import argparse
import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.harness import alternate, machine, markdown_table, mean_and_deviation, paired_ratio, rewrite

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
PROTOTYPES, HIDDEN, BOTTLENECK, LOCAL = 65536, 2048, 256, 8


def inputs(batch: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return global crops, local crops and masks, crop-major."""
    from patchloom.systems.dinov2.masks import draw_masks

    generator = torch.Generator().manual_seed(0)
    global_crops = torch.randn(2 * batch, 3, 224, 224, generator=generator)
    local_crops = torch.randn(LOCAL * batch, 3, 96, 96, generator=generator)
    masks = draw_masks((14, 14), batch, seed=0, step=0)
    return global_crops.to(device), local_crops.to(device), masks.to(device)


def ours(batch: int, device: str, precision: str, drop_path: float) -> Callable[[], None]:
    """Return one training step of ours."""
    from patchloom.encoders import create_encoder
    from patchloom.systems.dinov2.model import DINOv2

    global_crops, local_crops, masks = inputs(batch, device)
    encoder = create_encoder("vit_small_patch16_224", init_values=1e-5)
    model = DINOv2(encoder, out_dim=PROTOTYPES, hidden_dim=HIDDEN, bottleneck_dim=BOTTLENECK, drop_path=drop_path).to(
        device
    )
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            loss = model(global_crops, local_crops, masks, 0.05)["loss"]
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 3.0)
        optimizer.step()
        model.update_teacher(0.992)

    return step


def peer(batch: int, device: str, precision: str, drop_path: float) -> Callable[[], None]:
    """Return one training step made of lightly's parts, as its own DINOv2 example puts them together."""
    from lightly.loss import DINOLoss, IBOTPatchLoss, KoLeoLoss
    from lightly.models.modules import DINOProjectionHead, MaskedVisionTransformerTIMM
    from lightly.models.utils import update_drop_path_rate, update_momentum
    from timm.models.vision_transformer import vit_small_patch16_224

    global_crops, local_crops, masks = inputs(batch, device)
    teacher = MaskedVisionTransformerTIMM(
        vit_small_patch16_224(dynamic_img_size=True, init_values=1e-5, num_classes=0),
        antialias=False,
        pos_embed_initialization="skip",
    ).to(device)
    student = copy.deepcopy(teacher)
    update_drop_path_rate(student.vit, drop_path_rate=drop_path, mode="uniform")
    student_head = DINOProjectionHead(384, HIDDEN, BOTTLENECK, PROTOTYPES, norm_last_layer=False).to(device)
    teacher_head = DINOProjectionHead(384, HIDDEN, BOTTLENECK, PROTOTYPES, norm_last_layer=False).to(device)
    teacher_head.load_state_dict(student_head.state_dict())
    for module in (teacher, teacher_head):
        module.requires_grad_(False)
        module.eval()
    dino, ibot, koleo = DINOLoss(PROTOTYPES).to(device), IBOTPatchLoss(PROTOTYPES).to(device), KoLeoLoss()
    trained = [*student.parameters(), *student_head.parameters()]
    trained = [parameter for parameter in trained if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    prefixed = torch.cat([masks.new_zeros(len(masks), 1), masks.flatten(1)], dim=1)

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            with torch.no_grad():
                tokens = teacher.encode(global_crops)
                classes = teacher_head(tokens[:, 0])
                patches = teacher_head(tokens[prefixed])
            seen = student.encode(global_crops, mask=prefixed)
            small = student.encode(local_crops)
            said = torch.cat([student_head(seen[:, 0]), student_head(small[:, 0])])
            image_loss = dino(list(classes.chunk(2)), list(said.chunk(2 + LOCAL)), teacher_temp=0.05)
            patch_loss = ibot(patches, student_head(seen[prefixed]), mask=masks, teacher_temp=0.05)
            loss = image_loss + patch_loss + 0.1 * sum(koleo(view) for view in seen[:, 0].chunk(2))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 3.0)
        optimizer.step()
        update_momentum(student, teacher, 0.992)
        update_momentum(student_head, teacher_head, 0.992)

    return step


CANDIDATES = {"ours": ours, "peer": peer}


def peak_memory(name: str, options: argparse.Namespace, device: str) -> float:
    """Return the peak memory of three steps in GiB: of the GPU, or of a process of its own."""
    arguments = (options.batch, device, options.precision, options.drop_path)
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        step = CANDIDATES[name](*arguments)
        for _ in range(3):
            step()
        return torch.cuda.max_memory_allocated() / 2**30
    given = {name: getattr(options, name) for name in ("batch", "precision", "drop_path")}
    command = [sys.executable, "-m", "benchmarks.dinov2_step", "--memory", name]
    command += [word for key, value in given.items() for word in (f"--{key}", str(value))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def main() -> None:
    """Time both in turn and print or write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--drop_path", type=float, default=0.3)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--write", action="store_true", help="write the table to docs/performance.md")
    parser.add_argument("--memory", choices=list(CANDIDATES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    arguments = (options.batch, device, options.precision, options.drop_path)
    if options.memory:
        step = CANDIDATES[options.memory](*arguments)
        for _ in range(3):
            step()
        # Not getrusage: what it says of a child begins with the peak of the parent.
        status = Path("/proc/self/status").read_text()
        print(int(status.split("VmHWM:")[1].split()[0]) / 2**20)
        return

    def timed(call: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            call()
            if device == "cuda":
                torch.cuda.synchronize()

        return run

    steps = {name: timed(make(*arguments)) for name, make in CANDIDATES.items()}
    seconds = alternate(steps, rounds=options.rounds, warmup=1)
    del steps
    memory = {name: peak_memory(name, options, device) for name in CANDIDATES}
    ratio = paired_ratio(seconds["peer"], seconds["ours"])
    titles = {"ours": "DINOv2 ViT-S/16, ours", "peer": "lightly's parts"}
    rows = [
        [
            title,
            mean_and_deviation([options.batch / s for s in seconds[name]]),
            f"{memory[name]:.2f}",
            f"{ratio:.2f} ×" if name == "ours" else "1",
        ]
        for name, title in titles.items()
    ]
    setting = f"batch {options.batch}, {options.precision}, drop path {options.drop_path:g}"
    text = f"{machine()}\n\n{markdown_table([setting, 'images/s', 'peak GiB', 'speed'], rows)}"
    print(f"{text}\n\nTarget: at least 1.2 × and less memory.")
    if options.write:
        rewrite(PAGE, f"dinov2_step_{options.drop_path:g}", text)


if __name__ == "__main__":
    main()
