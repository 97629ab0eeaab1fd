"""What pictures and tables have in common: result files in, pictures and marked places out."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt

mpl.use("Agg")
mpl.rcParams["svg.hashsalt"] = "gist-rag"  # the same files give the same picture

HERE = Path(__file__).parent
ROOT = HERE.parent
WIDTH = 98


def load(folder: str) -> list[dict[str, Any]]:
    """All results of a folder, each with the name of its ``file``."""
    paths = sorted((HERE / folder / "results").glob("*.json"))
    return [json.loads(path.read_text()) | {"file": path.name} for path in paths]


def scores_of(name: str) -> dict[str, Any]:
    """Figures by arm of a result of ``quality``."""
    arms: dict[str, Any] = _quality(name)["arms"]
    return arms


def predictions_of(name: str) -> list[dict[str, Any]]:
    """Predictions of a result of ``quality``."""
    predictions: list[dict[str, Any]] = _quality(name)["predictions"]
    return predictions


def _quality(name: str) -> dict[str, Any]:
    path = HERE / "quality" / "results" / f"{name}.json"
    result: dict[str, Any] = json.loads(path.read_text())
    return result


def found(scores: dict[str, Any]) -> str:
    """Share of the answers that contain the gold one."""
    return f"{scores['contains']:.2f}"


def kept(scores: dict[str, Any]) -> str:
    """Share of the context's benefit, with its interval."""
    low, high = scores["m_norm_low"], scores["m_norm_high"]
    return f"{scores['m_norm']:.2f} ({low:.2f} to {high:.2f})"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    first, *others = (f"| {' | '.join(line)} |" for line in (head, *rows))
    return [first, "|---" * len(head) + "|", *others]


def put(path: Path, mark: str, *paragraphs: str) -> None:
    """Replace what stands between a pair of marks."""
    lines = []
    for paragraph in paragraphs:
        indent = "  " if paragraph.startswith("- ") else ""
        whole = paragraph.startswith("|") or not paragraph
        lines += (
            [paragraph]
            if whole
            else textwrap.wrap(paragraph, WIDTH, subsequent_indent=indent, break_on_hyphens=False)
        )
    block = "\n".join([f"<!-- {mark} -->", *lines, "<!-- end -->"])
    pattern = re.compile(rf"<!-- {mark} -->.*?<!-- end -->", re.DOTALL)
    text, count = pattern.subn(lambda _: block, path.read_text())
    if count != 1:
        raise SystemExit(f"{path} has {count} places marked {mark!r}; there should be one")
    path.write_text(text)


def save(figure: Any, name: str) -> None:
    folder = ROOT / "docs" / "img"
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / name, metadata={"Date": None})
    plt.close(figure)
