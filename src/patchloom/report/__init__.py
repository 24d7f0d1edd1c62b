"""Figures and the HTML report: pictures where people would rather look than read."""

from __future__ import annotations

from patchloom.report.figures import attention_maps, codebook_mosaic, image_grid, nearest_neighbours, pca_features
from patchloom.report.page import Figure, Section, add_section, write_report
from patchloom.report.plots import bars, curves, heat_map

__all__ = [
    "Figure",
    "Section",
    "add_section",
    "attention_maps",
    "bars",
    "codebook_mosaic",
    "curves",
    "heat_map",
    "image_grid",
    "nearest_neighbours",
    "pca_features",
    "write_report",
]
