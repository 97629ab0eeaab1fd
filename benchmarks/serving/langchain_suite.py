"""LangChain's standard tests on ChatGist and on ChatHuggingFace, with the same model.

    python benchmarks/serving/langchain_suite.py --json > langchain_suite.json

ChatGist runs as in ``tests/integrations/test_langchain_standard.py``; ChatHuggingFace as it comes,
over a pipeline, with what it says it can do. Takes some minutes on two cores.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from langchain_core.language_models import BaseChatModel
from langchain_huggingface import ChatHuggingFace, HuggingFacePipeline
from langchain_tests.integration_tests import ChatModelIntegrationTests
from langchain_tests.unit_tests import ChatModelUnitTests
from outcomes import main

from gist_rag.models import load_model

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


if __name__ == "__main__":
    main(SUITES, PACKAGES, max_tokens=MAX_TOKENS)
