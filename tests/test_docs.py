"""What the package and its pages cite can be looked up by who reads them."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_papers_and_published_code_are_cited_and_no_specification():
    files = [path for folder in ("src", "docs", "benchmarks") for path in (ROOT / folder).rglob("*.*")]
    texts = {path: path.read_text(encoding="utf-8") for path in files if path.suffix in (".py", ".md")}
    texts |= {ROOT / name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "CONTRIBUTING.md")}
    assert sum("arXiv" in text for text in texts.values()) > 100
    citing = [str(path.relative_to(ROOT)) for path, text in texts.items() if "specification" in text.lower()]
    assert not citing, f"cite the paper (authors, year, arXiv number) or the published code: {', '.join(citing)}"
