"""LangChain's standard tests on ChatGist and on ChatHuggingFace, with the same model.

    python benchmarks/serving/langchain_suite.py --json > langchain_suite.json

ChatGist runs as in ``tests/integrations/test_langchain_standard.py``; ChatHuggingFace as it comes,
over a pipeline, with what it says it can do. Takes some minutes on two cores.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import platform
import sys
import time
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from langchain_core.language_models import BaseChatModel
from langchain_huggingface import ChatHuggingFace, HuggingFacePipeline
from langchain_tests.integration_tests import ChatModelIntegrationTests
from langchain_tests.unit_tests import ChatModelUnitTests

from gist_rag.models import DEFAULT_MODEL, load_model

OURS = Path(__file__).parents[2] / "tests/integrations/test_langchain_standard.py"
SUITES = {
    "ChatGist": [f"{OURS}::TestUnit", f"{OURS}::TestRealModel"],
    "ChatHuggingFace": [f"{__file__}::TestUnit", f"{__file__}::TestRealModel"],
}
PACKAGES = ("langchain-core", "langchain-huggingface", "langchain-tests", "torch", "transformers")
MAX_TOKENS = 64


@pytest.fixture(scope="session")
def pipeline() -> HuggingFacePipeline:
    """The embedded model, as LangChain wraps a transformers pipeline."""
    from transformers import pipeline

    model, tokenizer = load_model()
    generate = pipeline(
        "text-generation",
        model=model,
        tokenizer=tokenizer,
        max_new_tokens=MAX_TOKENS,
        do_sample=False,
        return_full_text=False,
    )
    return HuggingFacePipeline(pipeline=generate)


class ChatHuggingFaceTests:
    """What ``ChatHuggingFace`` says it can do: everything that is on by default."""

    @pytest.fixture(autouse=True)
    def _pipeline(self, pipeline: HuggingFacePipeline) -> None:
        self.pipeline = pipeline

    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatHuggingFace

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"llm": self.pipeline}

    @property
    def supports_model_override(self) -> bool:
        return False


class TestUnit(ChatHuggingFaceTests, ChatModelUnitTests):
    """Construction."""


class TestRealModel(ChatHuggingFaceTests, ChatModelIntegrationTests):
    """Invocation."""


class Outcomes:
    """A pytest plugin that notes how each test ended."""

    def __init__(self) -> None:
        self.of: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            name = report.nodeid.split("::", 1)[1]
            outcome = "xfailed" if hasattr(report, "wasxfail") else str(report.outcome)
            self.of[name] = outcome


def run(tests: Sequence[str]) -> dict[str, Any]:
    """How many tests ended in which way, and which did not pass."""
    outcomes, started = Outcomes(), time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        pytest.main([*tests, "-q", "-p", "no:cacheprovider"], plugins=[outcomes])
    return {
        **Counter(outcomes.of.values()),
        "seconds": round(time.perf_counter() - started),
        "not_passed": {n: o for n, o in sorted(outcomes.of.items()) if o in ("failed", "xfailed")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the result file")
    as_json = parser.parse_args().json
    results = {name: run(tests) for name, tests in SUITES.items()}
    if as_json:
        environment = {
            "machine": platform.machine(),
            "python": platform.python_version(),
            "model": DEFAULT_MODEL,
            "max_tokens": MAX_TOKENS,
            **{name: version(name) for name in PACKAGES},
        }
        json.dump({"meta": environment, "results": results}, sys.stdout, indent=2)
        print()
        return
    for name, result in results.items():
        counts = ", ".join(f"{result.get(o, 0)} {o}" for o in ("passed", "failed", "xfailed"))
        print(f"{name}: {counts}, {result.get('skipped', 0)} skipped in {result['seconds']} s")


if __name__ == "__main__":
    main()
