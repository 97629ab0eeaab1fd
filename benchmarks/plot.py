"""Draw pictures, tables and the README's figures from the result files, and from nothing else.

Usage: python benchmarks/plot.py     (writes docs/img/*.svg, docs/results.md, parts of README.md)
"""

from __future__ import annotations

import json
import re
import textwrap
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt

from gist_rag.evaluate.config import Arm

mpl.use("Agg")
mpl.rcParams["svg.hashsalt"] = "gist-rag"  # the same files give the same picture

HERE = Path(__file__).parent
IMAGES = HERE.parent / "docs" / "img"
TABLES = HERE.parent / "docs" / "results.md"
README = HERE.parent / "README.md"
COLOURS = {
    "attention_matching": "#0b6e4f",
    "mean_pooled": "#c05746",
    "strided": "#e08e45",
    "truncated": "#7d7d7d",
    "trim_kv-4x": "#3a5ba0",
}


MARKS = {"as text": "--^", "budget": "-s", "weighed": "-P", ", ": "--o"}
WITHIN = "4-8-16/8x*"
HOW = {"": "", "*": "weighed"}
"""Readings that are drawn; the others are in the tables."""


def load(folder: str) -> list[dict[str, Any]]:
    paths = sorted((HERE / folder / "results").glob("*.json"))
    return [json.loads(path.read_text()) | {"file": path.name} for path in paths]


def draw_quality(results: list[dict[str, Any]]) -> None:
    """Share of the text's benefit kept, against the ratio, for one and for several passages."""
    counts = sorted({r["meta"]["passages"] for r in results})
    size = (4.6 * len(counts), 4.0)
    figure, axes = plt.subplots(1, len(counts), figsize=size, sharey=True, layout="constrained")
    for axis, count in zip([axes] if len(counts) == 1 else axes, counts, strict=True):
        lines: dict[str, list[tuple[float, float, float, float]]] = {}
        for result in (r for r in results if r["meta"]["passages"] == count):
            for arm, scores in result["arms"].items():
                read = Arm.parse(arm, result["meta"]["ratio"])
                name, ratio = read.name, read.ratios[0] if read.ratios else 0.0
                if read.budget:
                    ratio = scores["source_tokens"] / scores["kv_slots"]
                if name in COLOURS and ratio and read.how in HOW:
                    meta, parts = result["meta"], [name]
                    if name == meta["compressor"] and not read.how:  # else the README says it
                        parts += [meta["settings"].get("preset", ""), meta.get("codec") or ""]
                    parts += [HOW[read.how], "with a budget" if read.budget else ""]
                    parts += [f"{read.expanded} as text" if read.expanded else ""]
                    label = ", ".join(filter(None, parts))
                    point = (ratio, scores["m_norm"])
                    bounds = (scores["m_norm_low"], scores["m_norm_high"])
                    points = lines.setdefault(label, [])
                    if ratio not in (known for known, *_ in points):  # the larger file comes first
                        points.append(point + bounds)
        for label, points in sorted(lines.items()):
            ratios, kept, low, high = zip(*sorted(points), strict=True)
            colour = COLOURS[label.partition(",")[0]]
            style = next((mark for words, mark in MARKS.items() if words in label), "-o")
            axis.plot(ratios, kept, style, color=colour, label=label, markersize=4)
            axis.fill_between(ratios, low, high, color=colour, alpha=0.12, linewidth=0)
        axis.axhline(1, color="black", linewidth=0.8, linestyle=":")
        axis.set_xscale("log", base=2)
        axis.set_xticks([2, 4, 8, 16, 32], ["2x", "4x", "8x", "16x", "32x"])
        axis.set_title(f"{count} passage{'s' if count > 1 else ''}", fontsize=10)
        axis.set_xlabel("compression ratio (tokens per slot)")
    first = figure.axes[0]
    drawn = {line.get_label(): line for axis in figure.axes for line in axis.lines[:-1]}
    first.set_ylabel("share of the text's benefit kept (NLL)")
    first.set_ylim(-0.1, 1.2)
    figure.legend(drawn.values(), drawn.keys(), fontsize=7, loc="outside lower center", ncols=3)
    _save(figure, "quality.svg")


def draw_ttft(result: dict[str, Any]) -> None:
    """Time to first token from text and from gists."""
    rows = result["results"]
    figure, axis = plt.subplots(figsize=(4.6, 3.4), layout="constrained")
    counts = [row["passages"] for row in rows]
    axis.plot(counts, [r["ttft_text_ms"] / 1e3 for r in rows], "-o", color="#7d7d7d", label="text")
    for field, speedup, label, style, above in (
        ("ttft_apart_ms", "speedup_apart", "gists, read apart", "--D", 6),
        ("ttft_weighed_ms", "speedup_weighed", "gists, weighed", "-o", -12),
    ):
        seconds = [row[field] / 1e3 for row in rows]
        axis.plot(counts, seconds, style, color="#0b6e4f", label=label, markersize=4)
        for row, at in zip(rows, seconds, strict=True):
            axis.annotate(f"{row[speedup]:.1f}x", (row["passages"], at), xytext=(0, above),
                          textcoords="offset points", ha="center", fontsize=8)  # fmt: skip
    axis.set_ylim(bottom=-0.35)
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
        "Made by `python benchmarks/plot.py` from `benchmarks/*/results`. `M_norm` is what the README "
        "calls kept: 0 as without passages (`closed`), 1 as from their text (`full`), by NLL of the "
        "gold answer (lower is better); `by choice` is the same by choice; `slots` are those of a head, "
        "all passages together. What `@8`, `*`, `^3` and `+1` mean stands in "
        "[evaluation](evaluation.md#arms). The figures of the README are those of `rag_p1`, "
        "`rag_p5_weighed`, `rag_p10_weighed` and `ttft_cpu` first of all.",
        "",
    ]
    for result in sorted(quality, key=lambda result: not result["file"].startswith("rag_")):
        meta = result["meta"]
        lines += [
            f"## {meta['task']}, {meta['passages']} passage(s), {result['file']}",
            "",
            f"{meta['model']}, {meta.get('dtype') or 'float32'}, {meta['device']}, "
            f"{meta['threads']} threads, commit {meta['commit']}.",
            "",
            *([f"Note: {meta['note']}.", ""] if meta.get("note") else []),
            *(
                f"    {run['command']}  # {run['dtype'] or 'float32'}, commit {run['commit']}"
                for run in meta.get("before", ())
            ),
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
            "| passages | source tokens | text ms | gists ms | speed-up | weighed ms | speed-up | "
            f"{meta['apart']} apart ms | speed-up | load ms | compose ms | judge ms | read ms | "
            "no gists yet ms | bytes |",
            "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        for r in result["results"]:
            lines.append(
                f"| {r['passages']} | {r['source_tokens']} | {r['ttft_text_ms']:.0f} | "
                f"{r['ttft_gist_ms']:.0f} | {r['speedup']:.1f}x | "
                f"{r['ttft_weighed_ms']:.0f} | {r['speedup_weighed']:.1f}x | "
                f"{r['ttft_apart_ms']:.0f} | {r['speedup_apart']:.1f}x | {r['load_ms']:.1f} | "
                f"{r['compose_ms']:.1f} | {r['judge_ms']:.1f} | {r['read_ms']:.0f} | {r['ttft_miss_ms']:.0f} | "
                f"{r['bytes']:,} |"
            )
        lines.append("")
    TABLES.write_text("\n".join(lines))


def fill_readme() -> None:
    """The README's headline and limits."""
    read = lambda path: json.loads((HERE / path).read_text())
    one = read("quality/results/rag_p1.json")["arms"]
    five = read("quality/results/rag_p5.json")["arms"]
    both = read("quality/results/rag_p5_both.json")["arms"]
    weighed = {n: read(f"quality/results/rag_p{n}_weighed.json")["arms"] for n in (5, 10)}
    sqlite = read("quality/results/sqlite_p5_weighed.json")["arms"]
    trained = read("quality/results/trained_p1.json")["arms"]
    refined = read("quality/results/rag_p5_weighed_thorough.json")["arms"]
    fine = read("quality/results/rag_p5_weighed_int4.json")["arms"]
    shipped = read("quality/results/shipped_p1.json")["arms"]
    gists = [name for name in shipped if "-4x" in name and "trim_kv" not in name]
    kept = [shipped[name]["m_norm"] for name in gists]
    int4 = read("quality/results/rag_p1_int4.json")["arms"]
    plain_one = read("quality/results/nq_p1_balanced.json")["arms"]
    plain_five = read("quality/results/nq_p5_balanced.json")["arms"]
    ttft = {r["passages"]: r for r in read("serving/results/ttft_cpu.json")["results"]}
    hotpot = read("quality/results/hotpot_p5_weighed.json")["arms"]
    musique = read("quality/results/musique_p5_weighed.json")["arms"]
    swapped = read("quality/results/nq_swap_p1.json")["arms"]
    hotpot_apart = read("quality/results/hotpot_p5_both.json")["arms"]
    cost = read("serving/results/precompute_cpu.json")
    presets = {r["preset"]: r for r in cost["results"]}
    best_one = read("quality/results/nq_p1_best.json")["arms"]["attention_matching@16"]
    thorough_one = read("quality/results/rag_p1_thorough.json")["arms"]
    within = {r["passages"]: r for r in read("serving/results/ttft_budget_cpu.json")["results"]}
    ratios = {
        r["preset"]: r["prefills"]
        for r in read("serving/results/precompute_ratios_cpu.json")["results"]
    }
    nested = ratios["balanced, all ratios"] / ratios["balanced"]
    at = lambda arms, ratio: arms[f"attention_matching@{ratio}"]
    at_trained = lambda ratio: trained[f"trim_kv-4x@{ratio}"]
    first = lambda n, how: f"{ttft[n][how]:.1f} times sooner"
    _put(
        "headline",
        "SmolLM2-135M on a two-core CPU, gists at 8x loaded from disk, several passages weighed by an "
        f"embedder (`judge=`): with 5 passages the first token comes "
        f"**{first(5, 'speedup_weighed')}** than from text ({ttft[5]['ttft_weighed_ms'] / 1e3:.2f} s "
        f"instead of {ttft[5]['ttft_text_ms'] / 1e3:.2f} s), with 10 "
        f"**{first(10, 'speedup_weighed')}**. On Natural Questions, where one passage holds the answer:",
        "",
        "| passages | first token | kept | right, from gists | right, from text |",
        "|---|---|---|---|---|",
        f"| 1 | {first(1, 'speedup')} | {_kept(at(one, 8))} | {_found(at(one, 8))} | "
        f"{_found(one['full'])} |",
        *(
            f"| {n}, weighed | {first(n, 'speedup_weighed')} | {_kept(at(arms, '8*'))} | "
            f"{_found(at(arms, '8*'))} | {_found(arms['full'])} |"
            for n, arms in weighed.items()
        ),
        f"| 5, weighed, finest first within 8x | {within[5]['speedup_weighed']:.1f} times sooner | "
        f"{_kept(at(weighed[5], WITHIN))} | {_found(at(weighed[5], WITHIN))} | "
        f"{_found(weighed[5]['full'])} |",
        f"| 5, all alike | {first(5, 'speedup')} | {_kept(at(five, 8))} | {_found(at(five, 8))} | "
        f"{_found(five['full'])} |",
        "",
        "*Kept* is how much of what the passages bring is left, by the likelihood of the gold answer: 0 "
        "as without passages, 1 as from their text (95 % interval); *right* is the share of generated "
        f"answers that contain the gold one. {one['full']['n']}, "
        + ", ".join(str(arms["full"]["n"]) for arms in weighed.values())
        + f" and {five['full']['n']} questions. Likelihood is the milder judge, so look at both. More than "
        "the text gives does not mean that compressing adds anything: so small a model reads several "
        "texts badly, and weights spare it that. The bound is what uncompressed passages give, read "
        f"with weights: {_kept(weighed[5]['reuse*'])}, {_found(weighed[5]['reuse*'])} right, with five. "
        "That is reached in the slots of 8x where each passage is kept at 4x, 8x and 16x and those that "
        'matter most are read finest (`ratio=[4, 8, 16], budget="8x"`). '
        f"Where doubt has the best passage read as text (`expand=`, every prompt) "
        f"{_found(at(weighed[5], '8*+1'))} are right. Read the limits below before you quote any of that.",
    )
    _put(
        "limits",
        "- **A small model, with a trained reader.** Unless it says otherwise figures are of a 135M model "
        "with the reader that ships (`smollm2-135m-rag`), a LoRA trained on training questions of Natural "
        "Questions, SQuAD and HotpotQA. Without it, answers at 8x contain the gold answer in "
        f"{_found(at(plain_one, 8))} of the questions with one passage (text "
        f"{_found(plain_one['full'])}) and {_found(at(plain_five, 8))} with five, all alike (text "
        f"{_found(plain_five['full'])}). No larger model has been measured yet.",
        "- **Weights help where the answer stands in a passage that looks like the question.** The judge "
        "measured, MiniLM, was itself trained on Natural Questions among others; on the questions about "
        f"SQLite that ship ({sqlite['full']['n']}, five passages) weights take 8x from "
        f"{_kept(at(sqlite, 8))}, {_found(at(sqlite, 8))} right, to {_kept(at(sqlite, '8*'))}, "
        f"{_found(at(sqlite, '8*'))} (text {_found(sqlite['full'])}). Where an answer takes two passages "
        f"at once (HotpotQA, {hotpot['full']['n']} questions, five passages) 8x keeps "
        f"{_kept(at(hotpot, '8*'))} with weights, {_kept(at(hotpot, 8))} without, and is right in "
        f"{_found(at(hotpot, '8*'))} and {_found(at(hotpot, 8))} (with a budget, finest first, "
        f"{_kept(at(hotpot, WITHIN))} and {_found(at(hotpot, WITHIN))}), text in {_found(hotpot['full'])}; MuSiQue "
        f"({musique['full']['n']}) {_kept(at(musique, '8*'))} and {_kept(at(musique, 8))}, right in "
        f"{_found(at(musique, '8*'))} and {_found(at(musique, 8))}, text in {_found(musique['full'])}. `apart=3` "
        f"keeps {_kept(at(both, '8^3'))} of five on Natural Questions and "
        f"{_kept(at(hotpot_apart, '8^3'))} on HotpotQA, and its first token comes only "
        f"{ttft[5]['speedup_apart']:.1f} times sooner.",
        f"- **Beyond 8x quality falls.** At 16x gists keep {_kept(at(one, 16))} with one passage, and "
        f"answers contain the gold answer in {_found(at(one, 16))}. Exact names and numbers go first; "
        f"use 4x where they matter: five passages, weighed, in four bits, keep {_kept(at(fine, '4*'))}, "
        f"{_found(at(fine, '4*'))} right ({fine['full']['n']} questions, text {_found(fine['full'])}). What "
        "contradicts the model suffers even there: where the answer in a passage was exchanged for another "
        f"(NQ-Swap, {swapped['full']['n']} questions, one passage) 4x keeps {_kept(at(swapped, 4))}, "
        f"{_found(at(swapped, 4))} right (text {_found(swapped['full'])}). Five "
        f"at 16x, weighed, keep {_kept(at(weighed[5], '16*'))}, {_found(at(weighed[5], '16*'))} right; in "
        f"as many slots, but kept at 8x, 16x and 32x and read finest first "
        f"{_kept(at(weighed[5], '8-16-32/16x*'))}, {_found(at(weighed[5], '8-16-32/16x*'))} right; in half as "
        f"many, kept at 16x, 32x and 64x, {_kept(at(weighed[5], '16-32-64/32x*'))}, "
        f"{_found(at(weighed[5], '16-32-64/32x*'))} right.",
        "- **More thorough compressing lifts likelihood more than answers.** With `preset` `thorough` five passages, "
        f"weighed, keep {_kept(at(refined, '16*'))} at 16x, {_found(at(refined, '16*'))} right "
        f"({refined['full']['n']} questions, text {_found(refined['full'])}); with the one that matters "
        f"most as text (`expand=`, every prompt) {_kept(at(refined, '16*+1'))} and "
        f"{_found(at(refined, '16*+1'))}, at 32x {_kept(at(refined, '32*+1'))} and "
        f"{_found(at(refined, '32*+1'))}. One passage at 8x is no place for it: "
        f"{_kept(at(thorough_one, 8))}, but only {_found(at(thorough_one, 8))} right "
        f"({thorough_one['full']['n']} questions, uncompressed {_found(thorough_one['reuse'])}). Without the "
        f"reader `best` keeps {_kept(best_one)} of one passage at 16x.",
        f"- **KV gists are larger than text on disk**: {ttft[1]['bytes'] / 1e6:.2f} MB for a passage "
        f"of {ttft[1]['source_tokens']} tokens at 8x in bf16 with this model (its text: about "
        f"1 kB), half of that with `--codec int8`, a third with `int4`, which keeps "
        f"{_kept(at(int4, 8))} at 8x and {_kept(at(int4, 4))} at 4x ({int4['full']['n']} questions, "
        "one passage): 4x in four bits is smaller than 8x in sixteen, and better. Three ratios, for "
        "`budget=`, take 3.5 times as much as 8x alone: in four bits about as much as 8x in sixteen "
        f"({_kept(at(fine, WITHIN))}, {_found(at(fine, WITHIN))} right on those "
        f"{fine['full']['n']} questions with five).",
        f"- **Compressing costs** {presets['balanced']['prefills']:.1f} prefills of the passage "
        f"(`balanced`: {presets['balanced']['seconds_per_passage']:.1f} s for "
        f"{cost['meta']['median_tokens']:.0f} tokens on this CPU), {presets['fast']['prefills']:.1f} "
        f"with `fast`, {nested:.1f} times `balanced` for three ratios at once, {presets['thorough']['prefills']:.1f} with `thorough`, "
        f"{presets['best']['prefills']:.0f} with `best`; {presets['trim_kv-4x']['prefills']:.1f} with "
        f"`--compressor trim_kv-4x`, whose gates foretell what `fast` measures: it keeps "
        f"{_kept(at_trained(4))} at 4x and {_kept(at_trained(8))} at 8x with one passage, "
        f"{_kept(weighed[5]['trim_kv-4x@4*'])} at 4x with five, weighed. For another model they have to "
        "be trained first (minutes).",
        "- **No GPU has been seen.** The Triton kernels equal their references under Triton's "
        "interpreter and compile for sm_80, sm_90 and gfx942; no time on a GPU is claimed. Other "
        "engines (vLLM) cannot read gists yet.",
        "- **Of the nine published methods `trim_kv` is the one to use.** The eight others ship as well, "
        "each after ten to thirty minutes of a CPU, and that is too little for gist tokens: at 4x with "
        f"one passage they keep {min(kept):.2f} to {max(kept):.2f} ({shipped['full']['n']} questions), a "
        f"control that keeps every fourth token {shipped['strided@4']['m_norm']:.2f}, `trim_kv-4x` "
        f"{shipped['trim_kv-4x@4']['m_norm']:.2f} ([docs/methods.md](docs/methods.md)).",
    )


def _found(scores: dict[str, Any]) -> str:
    return f"{scores['contains']:.2f}"


def _kept(scores: dict[str, Any]) -> str:
    low, high = scores["m_norm_low"], scores["m_norm_high"]
    return f"{scores['m_norm']:.2f} ({low:.2f} to {high:.2f})"


def _put(mark: str, *paragraphs: str) -> None:
    """Replace what stands between a pair of marks in the README."""
    lines = []
    for paragraph in paragraphs:
        indent = "  " if paragraph.startswith("- ") else ""
        table = paragraph.startswith("|") or not paragraph
        lines += (
            [paragraph]
            if table
            else textwrap.wrap(paragraph, 98, subsequent_indent=indent, break_on_hyphens=False)
        )
    block = "\n".join([f"<!-- {mark} -->", *lines, "<!-- end -->"])
    pattern = re.compile(rf"<!-- {mark} -->.*?<!-- end -->", re.DOTALL)
    README.write_text(pattern.sub(lambda _: block, README.read_text()))


def _save(figure: Any, name: str) -> None:
    IMAGES.mkdir(parents=True, exist_ok=True)
    figure.savefig(IMAGES / name, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    quality_results = load("quality")
    ttft_results = [r for r in load("serving") if r["file"].startswith("ttft")]
    if quality_results:
        drawn = [
            r
            for r in quality_results
            if re.fullmatch(r"(rag|trained)_p[15](_weighed(_int4|_thorough)?)?.json", r["file"])
        ]
        draw_quality(sorted(drawn, key=lambda r: -r["arms"]["full"]["n"]))
    if ttft_results:
        draw_ttft(ttft_results[-1])
    write_tables(quality_results, ttft_results)
    fill_readme()
