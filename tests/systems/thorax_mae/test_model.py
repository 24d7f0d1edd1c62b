"""Masked reconstruction by a convolutional network against its formulas."""

from __future__ import annotations

import pytest
import torch

from patchloom.errors import UsageError
from patchloom.systems.thorax_mae.model import MaskedAutoencoderCNN

GENERATOR = torch.Generator().manual_seed(0)
IMAGES = torch.randn(2, 3, 8, 12, generator=GENERATOR)
NOISE = torch.rand(2, 6, generator=GENERATOR)


@pytest.mark.parametrize("masked_only", [False, True])
def test_the_loss_is_its_formula_and_hidden_patches_are_zero(masked_only):
    seen = []
    network = torch.nn.Conv2d(3, 3, 3, padding=1)
    network.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    output = MaskedAutoencoderCNN(network, 4, masked_only=masked_only)(IMAGES, 0.5, NOISE)
    errors = []
    for b in range(2):
        kept = NOISE[b].argsort()[:3].tolist()
        for n in range(6):
            rows, columns = slice(n // 3 * 4, n // 3 * 4 + 4), slice(n % 3 * 4, n % 3 * 4 + 4)
            cell, shown = IMAGES[b, :, rows, columns], seen[0][b, :, rows, columns]
            assert torch.equal(shown, cell if n in kept else torch.zeros_like(cell))
            assert output.mask[b, n] == (n not in kept)
            if n not in kept or not masked_only:
                errors.append((output.pred[b, :, rows, columns] - cell).double().square().mean())
    torch.testing.assert_close(output.loss.double(), torch.stack(errors).mean(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("network", "images", "arguments", "message"),
    [
        (torch.nn.Identity(), IMAGES, {"mask_ratio": 0.9}, "leaves none of 6 patches visible"),
        (torch.nn.Identity(), IMAGES[..., :10], {}, "image size 10 is not divisible by patch size 4"),
        (torch.nn.Identity(), IMAGES, {"noise": NOISE[:, :5]}, "one number per patch"),
        (torch.nn.Conv2d(3, 1, 1), IMAGES, {}, r"the network returns \(2, 1, 8, 12\)"),
    ],
)
def test_what_does_not_fit_is_refused(network, images, arguments, message):
    with pytest.raises(UsageError, match=message):
        MaskedAutoencoderCNN(network, 4)(images, **arguments)
