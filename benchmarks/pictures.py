"""The pictures of the docs, taken from the report of a run.

patchloom demo --out runs/demo
python -m benchmarks.pictures runs/demo
"""

from __future__ import annotations

import argparse
import base64
import json
import re
from pathlib import Path

from benchmarks.harness import machine, markdown_table, rewrite

ROOT = Path(__file__).parents[1]
PICTURES = {"demo": "What it sees", "codebook": "Codebook", "attention": "Attention", "features": "Patch features"}


def main() -> None:
    """Write the pictures to docs/pictures and the demo's table to the README."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder of the demo")
    run = parser.parse_args().run
    sections = (run / "report.html").read_text(encoding="utf-8").split("<section ")
    for name, title in PICTURES.items():
        section = next(part for part in sections if f"<h2>{title}" in part)
        found = re.search(r'base64,([^"]+)"', section)
        if found is None:
            raise ValueError(f"the section {title} of {run}/report.html has no picture")
        (ROOT / "docs" / "pictures" / f"{name}.png").write_bytes(base64.b64decode(found[1]))
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    kinds = {"trained": "CCViT, pre-trained", "untrained": "the same encoder, untrained", "pixels": "raw pixels, 16x16"}
    rows = [[n, *(f"{summary[f'{p}_{kind}']:.1%}" for p in ("knn", "linear"))] for kind, n in kinds.items()]
    table = markdown_table(["which photograph is this crop from?", "k-NN", "linear probe"], rows)
    rewrite(ROOT / "README.md", "demo", f"{table}\n\n{summary['seconds']:.0f} seconds. {machine()}.")


if __name__ == "__main__":
    main()
