"""The picture and the tables of ``docs/methods.md``, from the result files (see ``plot.py``)."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import matplotlib.pyplot as plt
from figures import ROOT, found, kept, predictions_of, put, save, scores_of, table

sys.path.insert(0, str(ROOT / "benchmarks" / "quality"))
from paired import differences

METHODS = ROOT / "docs" / "methods.md"
STEPS = {"unigist-4x": "100 steps", "sentence_anchored-4x": "100 steps"}
"""Of what ships, where they were not sixty."""
CONTROLS = ("strided", "mean_pooled")
UNTAUGHT = ("attention_matching", *CONTROLS)
EXACT = {
    "boundary": ("start", "middle", "end"),
    "surprise": ("related", "unrelated"),
    "punctuation": ("with", "without"),
    "along": ("first_8", "first_32"),
    "key_value": ("first_8", "first_36"),
}
"""Which scores of each probe are shown."""
Arms = Mapping[str, dict[str, Any]]


def gist_methods(arms: Arms) -> list[str]:
    """Names of the trained methods with gist tokens that a result has at 4x, the best first."""
    names = [arm.partition("@")[0] for arm in arms if arm.endswith("-4x@4")]
    names.remove("trim_kv-4x")
    return sorted(names, key=lambda name: -arms[f"{name}@4"]["m_norm"])


def draw() -> None:
    """Share kept against the ratio, all methods and controls, one passage."""
    arms = scores_of("shipped_p1")
    figure, axis = plt.subplots(figsize=(5.6, 4.2), layout="constrained")
    names = dict.fromkeys(arm.partition("@")[0] for arm in arms if "@" in arm)
    colours = plt.get_cmap("tab20").colors
    for number, name in enumerate(names):
        points = sorted(
            (float(arm.partition("@")[2]), scores["m_norm"])
            for arm, scores in arms.items()
            if arm.startswith(f"{name}@")
        )
        style = ":s" if name in CONTROLS else "-o"
        axis.plot(*zip(*points, strict=True), style, color=colours[number], label=name, ms=4)
    axis.axhline(1, color="black", linewidth=0.8, linestyle=":")
    axis.set_xscale("log", base=2)
    axis.set_xticks([2, 4, 8], ["2x", "4x", "8x"])
    axis.set_ylim(-0.3, 1.1)
    axis.set_xlabel("compression ratio (tokens per slot)")
    axis.set_ylabel("share of the text's benefit kept (NLL)")
    axis.set_title(f"one passage, {arms['full']['n']} questions", fontsize=10)
    figure.legend(fontsize=7, loc="outside lower center", ncols=3)
    save(figure, "methods.svg")


def fill() -> None:
    """All marked tables."""
    put(METHODS, "trained", *trained())
    put(METHODS, "shipped", *shipped())
    put(METHODS, "tasks", *tasks())
    put(METHODS, "long", *long())
    put(METHODS, "probes", *probes())
    put(METHODS, "thoughts", *thoughts())


def trained() -> list[str]:
    """``trim_kv-4x`` beside ``attention_matching``, whose 16x is that of the same questions."""
    ours, theirs, cost = "trim_kv-4x", "attention_matching", ("1.03", "3.1")
    one, alike, weighed = map(scores_of, ("trained_p1", "trained_p5", "rag_p5_weighed"))
    one[f"{theirs}@16"] = scores_of("rag_p1")[f"{theirs}@16"]

    def row(label: str, prefills: str, arms: Arms, *names: str) -> list[str]:
        told = (f"{kept(arms[n])}, {found(arms[n])}" if n in arms else "" for n in names)
        return [label, prefills, *told]

    def rows(what: str, arms: Arms, *kinds: str) -> list[list[str]]:
        label = f"{what} (text {found(arms['full'])}): "
        return [
            row(f"{before}`{name}`", prefills, arms, *(f"{name}@{kind}" for kind in kinds))
            for before, name, prefills in zip((label, ""), (ours, theirs), cost, strict=True)
        ]

    lines = rows("one passage", one, "4", "8", "16")
    lines.append(row("`strided`", "1", one, "strided@4", "strided@8", "strided@16"))
    lines += rows("five, all alike", alike, "4", "8", "16")
    lines += rows("five, weighed", weighed, "4*", "8*", "16*")
    lines += rows("three ratios within that one", weighed, "", "4-8-16/8x*", "8-16-32/16x*")
    return table(["", "prefills", "4x", "8x", "16x"], lines)


def shipped() -> list[str]:
    arms = scores_of("shipped_p1")
    beside, paper = scores_of("methods_untrained_p1"), scores_of("methods_paper_positions_p1")
    paper = {f"{arm}@4": scores for arm, scores in paper.items()}
    beside["incomes@4"] = paper.pop("incomes@4")  # whose gists have but one place

    def alone(scores: dict[str, Any] | None) -> str:
        return f"{scores['m_norm']:.2f}" if scores else ""

    def row(arm: str, untrained: str = "") -> list[str]:
        scores, name = arms[arm], arm.partition("@")[0]
        note = f" ({STEPS[name]})" if name in STEPS else " (control)" if name in CONTROLS else ""
        others = [alone(arms.get(f"{name}@{ratio}")) for ratio in (2, 8)]
        others += alone(beside.get(untrained)), alone(paper.get(untrained))
        share = "1" if arm == "full" else kept(scores)
        label = "text" if arm == "full" else f"`{name}`{note}"
        return [label, share, found(scores), f"{scores['choice']:.2f}", *others]

    head = ["", "kept at 4x", "right", "choice", "kept at 2x", "at 8x"]
    head += ["untrained, 4x", "untrained, where the papers have gists"]
    gists = [row(f"{name}@4", name.replace("-4x", "@4")) for name in gist_methods(arms)]
    controls = [row(f"{name}@4") for name in CONTROLS]
    best = [row("full"), row("attention_matching@4"), row("trim_kv-4x@4")]
    return table(head, [*best, *gists, *controls])


def tasks() -> list[str]:
    results = {"SQuAD": scores_of("squad_p1"), "NQ-Swap": scores_of("nq_swap_p1")}
    head = [f"{name} (text {found(arms['full'])})" for name, arms in results.items()]
    names = [arm for arm in results["SQuAD"] if "@" in arm]
    names.sort(key=lambda arm: -results["SQuAD"][arm]["m_norm"])
    rows = [
        [_label(arm), *(f"{kept(arms[arm])}, {found(arms[arm])}" for arms in results.values())]
        for arm in names
    ]
    return table(["", *head], rows)


def long() -> list[str]:
    """Passages of some 500 tokens, each arm also against ``gisting``, question by question."""
    name = "nq_long_p1"
    arms, against = scores_of(name), "gisting-4x@4"
    differing = {row["arm"]: row for row in differences(predictions_of(name), against)}
    head = ["", f"kept (text {found(arms['full'])} right)", "right", "against `gisting-4x`"]
    rows = []
    for arm in sorted(arms, key=lambda arm: -arms[arm]["m_norm"]):
        if "@" not in arm:
            continue
        row, beside = differing.get(arm), ""
        if row:
            low, high = row["kept_low"], row["kept_high"]
            beside = f"{row['kept']:+.2f} ({low:+.2f} to {high:+.2f})"
        rows.append([_label(arm), kept(arms[arm]), found(arms[arm]), beside])
    return table(head, rows)


def probes() -> list[str]:
    results = {name: scores_of(f"probe_{name}") for name in EXACT}
    head = []
    for name, arms in results.items():
        scores = ", ".join(EXACT[name]).replace("_", " ")
        head.append(f"{name} ({arms['full']['n']}): {scores}")
    gists = gist_methods(results["boundary"])
    names = [f"{n}@4" for n in ("attention_matching", "trim_kv-4x", *gists, *CONTROLS)]
    rows = [
        [_label(arm), *(_shares(results[probe], arm, probe) for probe in EXACT)]
        for arm in ("full", *names)
    ]
    return table(["", *head], rows)


def _shares(arms: Arms, arm: str, probe: str) -> str:
    if arm not in arms:
        return ""
    shares = ", ".join(f"{arms[arm]['scores'][score]:.2f}" for score in EXACT[probe])
    return f"{shares} ({arms[arm]['m_norm']:.2f})"


def thoughts() -> list[str]:
    arms = scores_of("thoughts_gsm8k")
    rows = [
        [f"`{arm}`", kept(s), f"{s['nll']:.3f}", f"{s['kv_slots']:.0f}", f"{s['peak']:.0f}"]
        for arm, s in sorted(arms.items(), key=lambda item: -item[1]["m_norm"])
    ]
    return table(["", "kept", "NLL", "entries seen", "at most"], rows)


def _label(arm: str) -> str:
    name, _, ratio = arm.partition("@")
    if arm == "full":
        return "text"
    note = f", {ratio}x" if name in UNTAUGHT or ratio != "4" else ""
    return f"`{name}`{note}{' (control)' if name in CONTROLS else ''}"


if __name__ == "__main__":
    draw()
    fill()
