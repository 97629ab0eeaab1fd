"""Every trained method learns by the same command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gist_rag.compressors import COMPRESSORS
from gist_rag.train.config import TrainConfig
from gist_rag.train.loop import Report, train

TRAINED = sorted(name for name, method in COMPRESSORS.items() if method.trained)


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """Two questions about short passages."""
    rows = [
        {
            "id": city,
            "question": f"Who lives in {city}?",
            "answers": [name],
            "passages": [
                {"text": f"A letter came. {name} lives in {city}. It rains there.", "gold": True}
            ],
        }
        for name, city in (("Ada", "Oslo"), ("Karla", "Turin"))
    ]
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("method", TRAINED)
def test_training_lowers_the_loss(
    method: str, questions: Path, tiny_model_folder: Path, tmp_path: Path
) -> None:
    config = TrainConfig.read(
        {
            "method": method,
            "data": [questions],
            "out": tmp_path / "run",
            "model": str(tiny_model_folder),
            "device": "cpu",
            "passages": (1, 1),
            "steps": 24,
            "batch_size": 2,
            "lr": 2e-2,
            "save_every": 24,
            "log_every": 1,
        }
    )
    reports: list[Report] = []
    train(config, reports.append)
    total = [sum(report.losses.values()) for report in reports]
    assert sum(total[-3:]) < 0.9 * sum(total[:3])
    assert set(reports[0].losses) >= set(COMPRESSORS[method].loss_weights)
