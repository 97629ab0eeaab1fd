"""``benchmarks/quality/thoughts.py`` on a small random model."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from gist_rag.backbone import Backbone
from gist_rag.layout import Layout
from gist_rag.lora import LoRAConfig
from gist_rag.losses import cross_entropy
from gist_rag.models import load_model
from gist_rag.reader import Reader
from gist_rag.train.traces import Trace

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "quality"))
import thoughts
from thoughts import SINKS, Asked, Everything, Recent, result_of, told, told_apart

BUDGET = 12
TRACE = Trace("How many pages are there?", "Two and two.\n\nThat is four.\n\nThe answer is 4", ())


@pytest.fixture
def asked(backbone: Backbone) -> Asked:
    return Asked.of(TRACE, backbone)


def test_nothing_forgotten_is_one_causal_pass(backbone: Backbone, asked: Asked) -> None:
    with torch.no_grad():
        row = told(Everything(backbone), asked, None)
        ids = torch.cat((asked.prompt, asked.answer))
        logits = backbone.logits(backbone.encode(ids[None])[-1, 0])[len(asked.prompt) - 1 : -1]
    expected = cross_entropy(logits, asked.answer)[len(asked.thoughts[0]) :].mean()
    assert row["nll"] == pytest.approx(float(expected), abs=1e-4)
    assert row["peak"] == len(ids) - 1


def test_the_newest_and_the_first_are_kept(backbone: Backbone, asked: Asked) -> None:
    """Trimmed after each token, a cache is a sliding window with sinks behind the whole prompt."""
    size, given = len(asked.prompt) + len(asked.answer), len(asked.prompt)
    assert given > BUDGET
    with torch.no_grad():
        row = told(Recent(backbone, BUDGET, slack=1), asked, None)
        index = torch.arange(size)
        begins = (index - BUDGET + SINKS).clamp_min(0)
        begins[:given] = 0
        layout = Layout(index, index, begins, index * 0, prefix=SINKS)
        ids = torch.cat((asked.prompt, asked.answer))
        hidden = backbone.encode(ids[None], layouts=[layout])[-1, 0]
    losses = cross_entropy(backbone.logits(hidden[given - 1 : -1]), asked.answer)
    expected = losses[len(asked.thoughts[0]) :].mean()
    assert row["nll"] == pytest.approx(float(expected), abs=1e-4)
    assert row["peak"] == BUDGET


def test_closed_tells_each_thought_as_if_it_were_the_first(
    backbone: Backbone, asked: Asked
) -> None:
    losses = []
    with torch.no_grad():
        for thought in asked.thoughts[1:]:
            ids = torch.cat((asked.prompt, thought))
            logits = backbone.logits(backbone.encode(ids[None])[-1, 0])
            losses.append(cross_entropy(logits[len(asked.prompt) - 1 : -1], thought))
        row = told_apart(backbone, asked, Reader(backbone, LoRAConfig()))
    assert row["nll"] == pytest.approx(float(torch.cat(losses).mean()), abs=1e-4)


@pytest.mark.parametrize(
    ("text", "number"), [("So 3 and $1,250.", "1250"), ("-2.5 left", "-2.5"), ("none", "")]
)
def test_results_are_last_numbers(text: str, number: str) -> None:
    assert result_of(text) == number


def test_a_run_is_gone_on_with(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = str(tiny_model_folder)
    Reader(Backbone(*load_model(model), name=model), LoRAConfig()).save_pretrained(
        tmp_path / "reader"
    )
    data, out = tmp_path / "data.jsonl", tmp_path / "out.json"
    rows = [{"question": f"{n} and {n}?", "answer": f"It is {n}.\n#### {n}"} for n in range(3)]
    data.write_text("\n".join(map(json.dumps, rows)))

    def run(limit: int) -> dict[str, Any]:
        options = ["--task", str(data), "--model", model, "--reader", str(tmp_path / "reader")]
        options += ["--light-thinker", "light_thinker", "--trim", "trim_kv", "--budgets", "8"]
        options += ["--max-tokens", "4", "--written", "2", "--out", str(out), "--limit", str(limit)]
        monkeypatch.setattr(sys, "argv", ["thoughts.py", *options])
        torch.manual_seed(0)  # of methods that nobody has trained
        thoughts.main()
        result: dict[str, Any] = json.loads(out.read_text())
        return result

    first, both = run(1), run(3)
    assert both["predictions"][: len(first["predictions"])] == first["predictions"]
    arms = both["arms"]
    assert arms.keys() == {"plain", "full", "closed", "light_thinker", "trim_kv@8", "recent@8"}
    assert {arm["n"] for arm in arms.values()} == {3}
    assert sum("answer" in row for row in both["predictions"] if row["arm"] == "full") == 2
    assert arms["full"]["nll"] == arms["plain"]["nll"]  # a LoRA that has learnt nothing
    assert arms["recent@8"]["peak"] < arms["light_thinker"]["peak"]
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--budgets", "9"])
    with pytest.raises(SystemExit, match="budgets"):
        thoughts.main()
