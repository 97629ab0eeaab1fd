"""``bench matching`` finds what it put into its store, by the same route that users take."""

from __future__ import annotations

import pytest

from gist_rag.errors import BadInput
from gist_rag.evaluate.matching import bench_matching


@pytest.mark.slow
def test_bench_finds_every_known_passage_and_no_other() -> None:
    steps: list[tuple[int, int]] = []
    result = bench_matching(40, prompts=3, progress=lambda *step: steps.append(step))
    assert steps == [(40, 40)]
    assert [row["found"] for row in result["results"]] == [5, 5, 0, 5]
    assert all(row["median_ms"] > 0 for row in result["results"])
    assert 5000 < result["results"][0]["characters"] < 7000


@pytest.mark.parametrize(("passages", "prompts"), [(4, 1), (10, 0)])
def test_too_little_to_measure_is_refused(passages: int, prompts: int) -> None:
    with pytest.raises(BadInput, match="or more"):
        bench_matching(passages, prompts=prompts)
