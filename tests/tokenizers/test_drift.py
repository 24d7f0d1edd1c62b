"""Has the camera changed? Figures against their formulas, false alarms against their level."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from patchloom.errors import UsageError
from patchloom.tokenizers.drift import compare, divergence
from patchloom.tokenizers.drift_command import measure_drift


def shares_of(count: int, weights: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    drawn = torch.multinomial(weights.expand(count, -1), 50, replacement=True, generator=generator)
    return torch.stack([torch.bincount(row, minlength=len(weights)) / 50 for row in drawn])


def test_divergence_is_the_formula() -> None:
    first, second = [0.5, 0.5, 0.0, 0.0], [0.25, 0.0, 0.25, 0.5]
    middle = [(a + b) / 2 for a, b in zip(first, second, strict=True)]
    parts = [sum(a * math.log2(a / m) for a, m in zip(one, middle, strict=True) if a) for one in (first, second)]
    found = divergence(torch.tensor(first).double(), torch.tensor(second).double())
    assert float(found) == pytest.approx(sum(parts) / 2, abs=1e-12)


def test_false_alarms_keep_to_their_level() -> None:
    generator, weights = torch.Generator().manual_seed(0), torch.tensor([4.0, 3, 2, 1])
    below = sum(
        compare(shares_of(30, weights, generator), shares_of(20, weights, generator), permutations=199).p_codes <= 0.1
        for _ in range(100)
    )
    assert 3 <= below <= 19  # 99.8 % of binomial draws with share 0.1


def test_a_small_change_of_all_images_is_seen() -> None:
    generator = torch.Generator().manual_seed(1)
    first = shares_of(60, torch.tensor([4.0, 3, 2, 1]), generator)
    second = shares_of(60, torch.tensor([4.0, 3, 2, 2]), generator)
    drift = compare(first, second, permutations=499)
    assert drift.p_codes == pytest.approx(1 / 500)
    assert drift.divergence > drift.by_chance


def test_errors_are_compared_on_their_own() -> None:
    shares = torch.full((40, 4), 0.25)
    errors = torch.linspace(1, 2, 40)
    drift = compare(shares, shares, errors, errors * 1.5, permutations=499)
    assert drift.error_ratio == pytest.approx(1.5)
    assert drift.p_error <= 0.004
    assert drift.p_codes == 1.0


@pytest.fixture
def piles(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for name, count, gain in (("before", 60, 1.0), ("same", 30, 1.0), ("darker", 30, 0.6)):
        (tmp_path / name).mkdir()
        for number in range(count):
            small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((32, 32))
            Image.fromarray((np.asarray(small) * gain).astype(np.uint8)).save(tmp_path / name / f"{number}.png")
    return tmp_path


def test_a_darker_camera_is_told_from_the_same(piles: Path) -> None:
    how = {"patch_size": 8, "image_size": 32, "k": 16, "num_workers": 0, "permutations": 199}
    same = measure_drift(str(piles / "before"), str(piles / "same"), **how)
    darker = measure_drift(str(piles / "before"), str(piles / "darker"), out=str(piles / "drift"), **how)
    assert same["verdict"].startswith("No drift")
    assert darker["verdict"].startswith("Drift")
    assert darker["p_codes"] == pytest.approx(1 / 200)
    assert same["images"] == [30, 30]  # the other half of the first made the codebook
    assert "Codes that gained and lost most" in (piles / "drift" / "report.html").read_text()
    with pytest.raises(UsageError, match="overwrite"):
        measure_drift(str(piles / "before"), str(piles / "same"), out=str(piles / "drift"), **how)


def test_one_image_is_no_pile() -> None:
    with pytest.raises(UsageError, match="at least two"):
        compare(torch.ones(1, 2), torch.ones(5, 2))
