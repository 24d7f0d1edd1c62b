"""The picture of the pages on defects: brick with defects drawn in, what was excised, repairs and maps.

    python -m benchmarks.defect_picture --out scratch/defects

Trains a small network for a few minutes, and takes the picture from its report.
"""

from __future__ import annotations

import argparse
import base64
import re
from pathlib import Path

import patchloom as pl
from benchmarks.claims.ear import surface

PICTURE = Path(__file__).parents[1] / "docs" / "pictures" / "defects.png"
TITLE = "Pictures: defects found"


def main() -> None:
    """Train, and write the picture to docs/pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("scratch/defects"))
    out = parser.parse_args().out
    run = pl.anomaly(
        "ear",
        data=str(surface("brick", out)),
        out=str(out / "run"),
        image_size=64,
        width=8,
        smoothing=9,
        mosaic_scale=16,
        max_steps=250,
        batch_size=8,
        num_workers=0,
        overwrite=True,
    )
    sections = run.report.read_text(encoding="utf-8").split("<section ")
    section = next(part for part in sections if f"<h2>{TITLE}" in part)
    found = re.search(r'base64,([^"]+)"', section)
    if found is None:
        raise ValueError(f"the section {TITLE} of {run.report} has no picture")
    PICTURE.write_bytes(base64.b64decode(found[1]))


if __name__ == "__main__":
    main()
