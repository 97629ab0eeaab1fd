"""Draw the README's pictures and tables from the result files, and from nothing else.

Usage: python benchmarks/plot.py          (writes docs/img/*.svg and docs/results.md)
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt

mpl.use("Agg")
mpl.rcParams["svg.hashsalt"] = "gist-rag"  # the same files give the same picture

HERE = Path(__file__).parent
IMAGES = HERE.parent / "docs" / "img"
TABLES = HERE.parent / "docs" / "results.md"
COLOURS = {
    "attention_matching": "#0b6e4f",
    "mean_pooled": "#c05746",
    "strided": "#e08e45",
    "truncated": "#7d7d7d",
}


def load(folder: str) -> list[dict[str, Any]]:
    paths = sorted((HERE / folder / "results").glob("*.json"))
    return [json.loads(path.read_text()) | {"file": path.name} for path in paths]


def draw_quality(results: list[dict[str, Any]]) -> None:
    """Share of the text's benefit kept, against the ratio, for one and for several passages."""
    counts = sorted({r["meta"]["passages"] for r in results})
    figure, axes = plt.subplots(1, len(counts), figsize=(4.6 * len(counts), 3.4), sharey=True)
    for axis, count in zip([axes] if len(counts) == 1 else axes, counts, strict=True):
        lines: dict[str, list[tuple[float, float, float, float]]] = {}
        for result in (r for r in results if r["meta"]["passages"] == count):
            for arm, scores in result["arms"].items():
                name, _, ratio = arm.partition("@")
                if name in COLOURS:
                    refined = result["meta"]["settings"].get("preset") == "best"
                    label = f"{name}, refined" if refined else name
                    point = (float(ratio or result["meta"]["ratio"]), scores["m_norm"])
                    bounds = (scores["m_norm_low"], scores["m_norm_high"])
                    lines.setdefault(label, []).append(point + bounds)
        for label, points in sorted(lines.items()):
            ratios, kept, low, high = zip(*sorted(points), strict=True)
            colour = COLOURS[label.partition(",")[0]]
            style = "--D" if "refined" in label else "-o"
            axis.plot(ratios, kept, style, color=colour, label=label, markersize=4)
            axis.fill_between(ratios, low, high, color=colour, alpha=0.12, linewidth=0)
        axis.axhline(1, color="black", linewidth=0.8, linestyle=":")
        axis.set_xscale("log", base=2)
        axis.set_xticks([2, 4, 8, 16], ["2x", "4x", "8x", "16x"])
        axis.set_title(f"{count} passage{'s' if count > 1 else ''}", fontsize=10)
        axis.set_xlabel("compression ratio (tokens per slot)")
    first = axes if len(counts) == 1 else axes[0]
    first.set_ylabel("share of the text's benefit kept (NLL)")
    first.set_ylim(-0.6, 1.4)
    first.legend(fontsize=7, loc="lower left")
    _save(figure, "quality.svg")


def draw_ttft(result: dict[str, Any]) -> None:
    """Time to first token from text and from gists."""
    rows = result["results"]
    figure, axis = plt.subplots(figsize=(4.6, 3.4))
    counts = [row["passages"] for row in rows]
    axis.plot(counts, [r["ttft_text_ms"] / 1e3 for r in rows], "-o", color="#7d7d7d", label="text")
    axis.plot(counts, [r["ttft_gist_ms"] / 1e3 for r in rows], "-o", color="#0b6e4f", label="gists")
    for row in rows:
        place = (row["passages"], row["ttft_gist_ms"] / 1e3)
        axis.annotate(f"{row['speedup']:.1f}x", place, textcoords="offset points", xytext=(0, 6),
                      ha="center", fontsize=8)  # fmt: skip
    axis.set_xlabel("passages in the prompt")
    axis.set_ylabel("seconds to first token")
    axis.set_title(f"{result['meta']['model']}, {result['meta']['device']}", fontsize=8)
    axis.legend(fontsize=8)
    _save(figure, "ttft.svg")


def write_tables(quality: list[dict[str, Any]], ttft: list[dict[str, Any]]) -> None:
    """All figures, each under the command that made them."""
    lines = [
        "# Results",
        "",
        "Made by `python benchmarks/plot.py` from `benchmarks/*/results`.",
        "",
    ]
    for result in quality:
        meta = result["meta"]
        lines += [
            f"## {meta['task']}, {meta['passages']} passage(s), {result['file']}",
            "",
            f"{meta['model']}, {meta.get('dtype') or 'float32'}, {meta['device']}, "
            f"{meta['threads']} threads, commit {meta['commit']}.",
            "",
            f"    {meta['command']}",
            "",
            "| arm | n | NLL | choice | EM | contains | F1 | M_norm (95 %) | by choice | slots |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
        for arm, s in result["arms"].items():
            lines.append(
                f"| {arm} | {s['n']} | {s['nll']:.3f} | {s['choice']:.2f} | {s['em']:.2f} | "
                f"{s['contains']:.2f} | {s['f1']:.3f} | {s['m_norm']:.2f} "
                f"({s['m_norm_low']:.2f} to {s['m_norm_high']:.2f}) | {s['m_norm_choice']:.2f} | "
                f"{s['kv_slots']:.0f} |"
            )
        lines.append("")
    for result in ttft:
        meta = result["meta"]
        lines += [
            f"## Time to first token, {result['file']}",
            "",
            f"{meta['model']}, {meta['dtype']}, {meta['ratio']}x, {meta['device']}, "
            f"{meta['threads']} threads, commit {meta['commit']}; precompute "
            f"{meta['precompute_seconds_per_passage']} s per passage.",
            "",
            f"    {meta['command']}",
            "",
            "| passages | source tokens | text ms | gists ms | speed-up | load ms | compose ms | "
            "read ms | no gists yet ms | bytes |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
        for r in result["results"]:
            lines.append(
                f"| {r['passages']} | {r['source_tokens']} | {r['ttft_text_ms']:.0f} | "
                f"{r['ttft_gist_ms']:.0f} | {r['speedup']:.1f}x | {r['load_ms']:.1f} | "
                f"{r['compose_ms']:.1f} | {r['read_ms']:.0f} | {r['ttft_miss_ms']:.0f} | "
                f"{r['bytes']:,} |"
            )
        lines.append("")
    TABLES.write_text("\n".join(lines))


def _save(figure: Any, name: str) -> None:
    IMAGES.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(IMAGES / name, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    quality_results, ttft_results = load("quality"), load("serving")
    if quality_results:
        draw_quality(quality_results)
    if ttft_results:
        draw_ttft(ttft_results[-1])
    write_tables(quality_results, ttft_results)
