"""The contract of a local LLM of LlamaIndex on GistLLM and on HuggingFaceLLM, with the same model.

    pip install llama-index-llms-huggingface==0.8.0
    python benchmarks/serving/llama_index_suite.py --json > llama_index_suite.json

LlamaIndex has no standard tests for LLMs; ``tests/integrations/test_llama_index_standard.py`` says
what is asked here. HuggingFaceLLM is as it comes, greedy, with its chat
template. Takes some minutes on two cores.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
from llama_index.llms.huggingface import HuggingFaceLLM
from outcomes import main

from gist_rag.models import load_model

TESTS = Path(__file__).parents[2] / "tests/integrations"
sys.path.insert(0, str(TESTS))
from test_llama_index_standard import LLMContract  # noqa: E402

SUITES = {
    "GistLLM": [f"{TESTS}/test_llama_index_standard.py::TestRealModel"],
    "HuggingFaceLLM": [f"{__file__}::TestHuggingFaceLLM"],
}
PACKAGES = ("llama-index-core", "llama-index-llms-huggingface")


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    """The embedded model and its tokenizer."""
    return load_model()


class TestHuggingFaceLLM(LLMContract):
    max_new_tokens = 32
    bad_fields: ClassVar[dict[str, Any]] = {
        "generate_kwargs": {"do_sample": True, "temperature": -1.0}
    }

    @pytest.fixture
    def model(self, loaded: tuple[Any, Any]) -> Any:
        return loaded[0]

    @pytest.fixture
    def make_llm(self, loaded: tuple[Any, Any]) -> Callable[..., HuggingFaceLLM]:
        model, tokenizer = loaded

        def make(**fields: Any) -> HuggingFaceLLM:
            usual = {
                "max_new_tokens": self.max_new_tokens,
                "context_window": model.config.max_position_embeddings,
                "is_chat_model": True,
                "generate_kwargs": {"do_sample": False},
            }
            return HuggingFaceLLM(model=model, tokenizer=tokenizer, **usual | fields)

        return make


if __name__ == "__main__":
    main(SUITES, PACKAGES, max_tokens=TestHuggingFaceLLM.max_new_tokens)
