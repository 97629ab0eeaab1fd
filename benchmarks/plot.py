"""Draw pictures, tables and the README's figures from the result files, and from nothing else.

Usage: python benchmarks/plot.py
(writes docs/img/*.svg, docs/results.md, and marked parts of README.md and docs/methods.md)
"""

from __future__ import annotations

import json
import re
from typing import Any

import matplotlib.pyplot as plt
import methods
from figures import HERE, ROOT, found, kept, load, put, save, scores_of, table

from gist_rag.evaluate.config import Arm

TABLES = ROOT / "docs" / "results.md"
README = ROOT / "README.md"
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
COLUMNS = {
    "n": ("n", "{}"),
    "nll": ("NLL", "{:.3f}"),
    "choice": ("choice", "{:.2f}"),
    "em": ("EM", "{:.2f}"),
    "contains": ("contains", "{:.2f}"),
    "f1": ("F1", "{:.3f}"),
    "m_norm": ("M_norm (95 %)", ""),
    "m_norm_choice": ("by choice", "{:.2f}"),
    "kv_slots": ("slots", "{:.0f}"),
    "peak": ("at most", "{:.0f}"),
    "written": ("tokens written", "{:.0f}"),
}
"""Figures of an arm, with what stands above them and how they are written."""


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
            ratios, shares, low, high = zip(*sorted(points), strict=True)
            colour = COLOURS[label.partition(",")[0]]
            style = next((mark for words, mark in MARKS.items() if words in label), "-o")
            axis.plot(ratios, shares, style, color=colour, label=label, markersize=4)
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
    save(figure, "quality.svg")


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
    save(figure, "ttft.svg")


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
        meta, arms = result["meta"], result["arms"]
        what = f"probe {meta['probe']}" if meta.get("probe") else meta["task"]
        count = f", {meta['passages']} passage(s)" if "passages" in meta else ""
        fields = [field for field in COLUMNS if any(field in scores for scores in arms.values())]
        asked = list(dict.fromkeys(name for s in arms.values() for name in s.get("scores", ())))
        rows = [
            [arm, *(_cell(scores, field) for field in fields)]
            + [f"{scores['scores'][name]:.2f}" for name in asked]
            for arm, scores in arms.items()
        ]
        lines += [
            f"## {what}{count}, {result['file']}",
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
            *table(["arm", *(COLUMNS[field][0] for field in fields), *asked], rows),
            "",
        ]
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


def _cell(scores: dict[str, Any], field: str) -> str:
    if field == "m_norm":
        return kept(scores)
    return COLUMNS[field][1].format(scores[field]) if field in scores else ""


def fill_readme() -> None:
    """The README's headline and limits."""
    read = lambda path: json.loads((HERE / path).read_text())
    one = scores_of("rag_p1")
    five = scores_of("rag_p5")
    both = scores_of("rag_p5_both")
    weighed = {n: scores_of(f"rag_p{n}_weighed") for n in (5, 10)}
    sqlite = scores_of("sqlite_p5_weighed")
    trained = scores_of("trained_p1")
    refined = scores_of("rag_p5_weighed_thorough")
    fine = scores_of("rag_p5_weighed_int4")
    shipped = scores_of("shipped_p1")
    most, *_, least = (shipped[f"{name}@4"]["m_norm"] for name in methods.gist_methods(shipped))
    int4 = scores_of("rag_p1_int4")
    plain_one = scores_of("nq_p1_balanced")
    plain_five = scores_of("nq_p5_balanced")
    ttft = {r["passages"]: r for r in read("serving/results/ttft_cpu.json")["results"]}
    hotpot = scores_of("hotpot_p5_weighed")
    musique = scores_of("musique_p5_weighed")
    swapped = scores_of("nq_swap_p1")
    hotpot_apart = scores_of("hotpot_p5_both")
    cost = read("serving/results/precompute_cpu.json")
    presets = {r["preset"]: r for r in cost["results"]}
    best_one = scores_of("nq_p1_best")["attention_matching@16"]
    thorough_one = scores_of("rag_p1_thorough")
    within = {r["passages"]: r for r in read("serving/results/ttft_budget_cpu.json")["results"]}
    ratios = {
        r["preset"]: r["prefills"]
        for r in read("serving/results/precompute_ratios_cpu.json")["results"]
    }
    nested = ratios["balanced, all ratios"] / ratios["balanced"]
    at = lambda arms, ratio: arms[f"attention_matching@{ratio}"]
    at_trained = lambda ratio: trained[f"trim_kv-4x@{ratio}"]
    first = lambda n, how: f"{ttft[n][how]:.1f} times sooner"
    put(
        README,
        "headline",
        "SmolLM2-135M on a two-core CPU, gists at 8x loaded from disk, several passages weighed by an "
        f"embedder (`judge=`): with 5 passages the first token comes "
        f"**{first(5, 'speedup_weighed')}** than from text ({ttft[5]['ttft_weighed_ms'] / 1e3:.2f} s "
        f"instead of {ttft[5]['ttft_text_ms'] / 1e3:.2f} s), with 10 "
        f"**{first(10, 'speedup_weighed')}**. On Natural Questions, where one passage holds the answer:",
        "",
        "| passages | first token | kept | right, from gists | right, from text |",
        "|---|---|---|---|---|",
        f"| 1 | {first(1, 'speedup')} | {kept(at(one, 8))} | {found(at(one, 8))} | "
        f"{found(one['full'])} |",
        *(
            f"| {n}, weighed | {first(n, 'speedup_weighed')} | {kept(at(arms, '8*'))} | "
            f"{found(at(arms, '8*'))} | {found(arms['full'])} |"
            for n, arms in weighed.items()
        ),
        f"| 5, weighed, finest first within 8x | {within[5]['speedup_weighed']:.1f} times sooner | "
        f"{kept(at(weighed[5], WITHIN))} | {found(at(weighed[5], WITHIN))} | "
        f"{found(weighed[5]['full'])} |",
        f"| 5, all alike | {first(5, 'speedup')} | {kept(at(five, 8))} | {found(at(five, 8))} | "
        f"{found(five['full'])} |",
        "",
        "*Kept* is how much of what the passages bring is left, by the likelihood of the gold answer: 0 "
        "as without passages, 1 as from their text (95 % interval); *right* is the share of generated "
        f"answers that contain the gold one. {one['full']['n']}, "
        + ", ".join(str(arms["full"]["n"]) for arms in weighed.values())
        + f" and {five['full']['n']} questions. Likelihood is the milder judge, so look at both. More than "
        "the text gives does not mean that compressing adds anything: so small a model reads several "
        "texts badly, and weights spare it that. The bound is what uncompressed passages give, read "
        f"with weights: {kept(weighed[5]['reuse*'])}, {found(weighed[5]['reuse*'])} right, with five. "
        "That is reached in the slots of 8x where each passage is kept at 4x, 8x and 16x and those that "
        'matter most are read finest (`ratio=[4, 8, 16], budget="8x"`). '
        f"Where doubt has the best passage read as text (`expand=`, every prompt) "
        f"{found(at(weighed[5], '8*+1'))} are right. Read the limits below before you quote any of that.",
    )
    put(
        README,
        "limits",
        "- **A small model, with a trained reader.** Unless it says otherwise figures are of a 135M model "
        "with the reader that ships (`smollm2-135m-rag`), a LoRA trained on training questions of Natural "
        "Questions, SQuAD and HotpotQA. Without it, answers at 8x contain the gold answer in "
        f"{found(at(plain_one, 8))} of the questions with one passage (text "
        f"{found(plain_one['full'])}) and {found(at(plain_five, 8))} with five, all alike (text "
        f"{found(plain_five['full'])}). No larger model has been measured yet.",
        "- **Weights help where the answer stands in a passage that looks like the question.** The judge "
        "measured, MiniLM, was itself trained on Natural Questions among others; on the questions about "
        f"SQLite that ship ({sqlite['full']['n']}, five passages) weights take 8x from "
        f"{kept(at(sqlite, 8))}, {found(at(sqlite, 8))} right, to {kept(at(sqlite, '8*'))}, "
        f"{found(at(sqlite, '8*'))} (text {found(sqlite['full'])}). Where an answer takes two passages "
        f"at once (HotpotQA, {hotpot['full']['n']} questions, five passages) 8x keeps "
        f"{kept(at(hotpot, '8*'))} with weights, {kept(at(hotpot, 8))} without, and is right in "
        f"{found(at(hotpot, '8*'))} and {found(at(hotpot, 8))} (with a budget, finest first, "
        f"{kept(at(hotpot, WITHIN))} and {found(at(hotpot, WITHIN))}), text in {found(hotpot['full'])}; MuSiQue "
        f"({musique['full']['n']}) {kept(at(musique, '8*'))} and {kept(at(musique, 8))}, right in "
        f"{found(at(musique, '8*'))} and {found(at(musique, 8))}, text in {found(musique['full'])}. `apart=3` "
        f"keeps {kept(at(both, '8^3'))} of five on Natural Questions and "
        f"{kept(at(hotpot_apart, '8^3'))} on HotpotQA, and its first token comes only "
        f"{ttft[5]['speedup_apart']:.1f} times sooner.",
        f"- **Beyond 8x quality falls.** At 16x gists keep {kept(at(one, 16))} with one passage, and "
        f"answers contain the gold answer in {found(at(one, 16))}. Exact names and numbers go first; "
        f"use 4x where they matter: five passages, weighed, in four bits, keep {kept(at(fine, '4*'))}, "
        f"{found(at(fine, '4*'))} right ({fine['full']['n']} questions, text {found(fine['full'])}). What "
        "contradicts the model suffers even there: where the answer in a passage was exchanged for another "
        f"(NQ-Swap, {swapped['full']['n']} questions, one passage) 4x keeps {kept(at(swapped, 4))}, "
        f"{found(at(swapped, 4))} right (text {found(swapped['full'])}). Five "
        f"at 16x, weighed, keep {kept(at(weighed[5], '16*'))}, {found(at(weighed[5], '16*'))} right; in "
        f"as many slots, but kept at 8x, 16x and 32x and read finest first "
        f"{kept(at(weighed[5], '8-16-32/16x*'))}, {found(at(weighed[5], '8-16-32/16x*'))} right; in half as "
        f"many, kept at 16x, 32x and 64x, {kept(at(weighed[5], '16-32-64/32x*'))}, "
        f"{found(at(weighed[5], '16-32-64/32x*'))} right.",
        "- **More thorough compressing lifts likelihood more than answers.** With `preset` `thorough` five passages, "
        f"weighed, keep {kept(at(refined, '16*'))} at 16x, {found(at(refined, '16*'))} right "
        f"({refined['full']['n']} questions, text {found(refined['full'])}); with the one that matters "
        f"most as text (`expand=`, every prompt) {kept(at(refined, '16*+1'))} and "
        f"{found(at(refined, '16*+1'))}, at 32x {kept(at(refined, '32*+1'))} and "
        f"{found(at(refined, '32*+1'))}. One passage at 8x is no place for it: "
        f"{kept(at(thorough_one, 8))}, but only {found(at(thorough_one, 8))} right "
        f"({thorough_one['full']['n']} questions, uncompressed {found(thorough_one['reuse'])}). Without the "
        f"reader `best` keeps {kept(best_one)} of one passage at 16x.",
        f"- **KV gists are larger than text on disk**: {ttft[1]['bytes'] / 1e6:.2f} MB for a passage "
        f"of {ttft[1]['source_tokens']} tokens at 8x in bf16 with this model (its text: about "
        f"1 kB), half of that with `--codec int8`, a third with `int4`, which keeps "
        f"{kept(at(int4, 8))} at 8x and {kept(at(int4, 4))} at 4x ({int4['full']['n']} questions, "
        "one passage): 4x in four bits is smaller than 8x in sixteen, and better. Three ratios, for "
        "`budget=`, take 3.5 times as much as 8x alone: in four bits about as much as 8x in sixteen "
        f"({kept(at(fine, WITHIN))}, {found(at(fine, WITHIN))} right on those "
        f"{fine['full']['n']} questions with five).",
        f"- **Compressing costs** {presets['balanced']['prefills']:.1f} prefills of the passage "
        f"(`balanced`: {presets['balanced']['seconds_per_passage']:.1f} s for "
        f"{cost['meta']['median_tokens']:.0f} tokens on this CPU), {presets['fast']['prefills']:.1f} "
        f"with `fast`, {nested:.1f} times `balanced` for three ratios at once, {presets['thorough']['prefills']:.1f} with `thorough`, "
        f"{presets['best']['prefills']:.0f} with `best`; {presets['trim_kv-4x']['prefills']:.1f} with "
        f"`--compressor trim_kv-4x`, whose gates foretell what `fast` measures: it keeps "
        f"{kept(at_trained(4))} at 4x and {kept(at_trained(8))} at 8x with one passage, "
        f"{kept(weighed[5]['trim_kv-4x@4*'])} and {kept(weighed[5]['trim_kv-4x@8*'])} with five, weighed "
        f"({found(weighed[5]['trim_kv-4x@4*'])} and {found(weighed[5]['trim_kv-4x@8*'])} right, text "
        f"{found(weighed[5]['full'])}). For another model they have to be trained first (minutes).",
        "- **No GPU has been seen.** The Triton kernels equal their references under Triton's "
        "interpreter and compile for sm_80, sm_90 and gfx942; no time on a GPU is claimed. Other "
        "engines (vLLM) cannot read gists yet.",
        "- **Of the nine published methods `trim_kv` is the one to use.** The eight others ship as well, "
        "each after ten to thirty minutes of a CPU, and that is too little for gist tokens: at 4x with "
        f"one passage they keep {least:.2f} to {most:.2f} ({shipped['full']['n']} questions), a "
        f"control that keeps every fourth token {shipped['strided@4']['m_norm']:.2f}, `trim_kv-4x` "
        f"{shipped['trim_kv-4x@4']['m_norm']:.2f} ([docs/methods.md](docs/methods.md)).",
    )


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
    methods.draw()
    methods.fill()
