"""The demo end to end, shortened: figures, summary, report."""

from __future__ import annotations

import json
import sys

import pytest

import patchloom as pl


@pytest.mark.slow
def test_the_demo_leaves_its_figures_and_report(tmp_path, monkeypatch, capsys):
    from patchloom.data import embedded

    monkeypatch.setitem(embedded.DEFAULT_CROPS, "train", 54)
    monkeypatch.setitem(embedded.DEFAULT_CROPS, "test", 36)
    monkeypatch.setattr(
        sys.modules["patchloom.demo"],
        "RECIPE",
        {"batch_size": 16, "k": 32, "codebook_images": 20, "max_steps": 2, "probe_every": 0},
    )
    out = tmp_path / "demo"
    summary = pl.demo(out=str(out), num_workers=0)
    names = [f"{protocol}_{kind}" for protocol in ("knn", "linear") for kind in ("trained", "untrained", "pixels")]
    assert all(0 <= summary[name] <= 1 for name in names)
    assert summary["seconds"] > 0
    assert json.loads((out / "summary.json").read_text())["knn_trained"] == summary["knn_trained"]
    page = (out / "report.html").read_text()
    assert page.index("Which photograph is this crop from?") < page.index("Codebook")
    printed = capsys.readouterr().out
    assert "raw pixels" in printed
    assert f"{summary['linear_untrained']:.1%}" in printed
    with pytest.raises(pl.UsageError, match="is not empty"):
        pl.demo(out=str(out))
