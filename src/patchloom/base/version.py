"""The version of the package that is installed."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("patchloom")
except PackageNotFoundError:  # running from a source tree that was never installed
    __version__ = "0+unknown"
