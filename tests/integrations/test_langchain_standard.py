"""LangChain's own tests: for chat models, with a tiny random and with a real model; for retrievers.

The tiny model cannot choose a tool or copy an argument, so its run leaves tools out; the real one
has them, with calls that constrained decoding keeps to their form.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import HumanMessage
from langchain_core.retrievers import BaseRetriever
from langchain_tests.integration_tests import ChatModelIntegrationTests, RetrieversIntegrationTests
from langchain_tests.unit_tests import ChatModelUnitTests

from gist_rag.backbone import Backbone
from gist_rag.compressors import make_compressor
from gist_rag.engine import GistEngine
from gist_rag.rag import GistRAG
from gist_rag.types import Passage
from langchain_gist_rag import ChatGist, GistRetriever


class ChatGistTests:
    """What ``ChatGist`` can do."""

    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatGist

    @property
    def supports_anthropic_inputs(self) -> bool:
        return True

    @property
    def supports_model_override(self) -> bool:
        return False


@pytest.mark.filterwarnings("ignore:ChatGist does not know api_key")
class TestUnit(ChatGistTests, ChatModelUnitTests):
    """Construction; no engine is ever built."""


class TestTinyModel(ChatGistTests, ChatModelIntegrationTests):
    """Invocation, over the tiny random model."""

    @property
    def has_tool_calling(self) -> bool:
        return False

    @property
    def has_structured_output(self) -> bool:
        return False

    @pytest.fixture
    def model(self, engine: GistEngine) -> BaseChatModel:
        return ChatGist(engine=engine, max_tokens=8)


@pytest.fixture(scope="module")
def real_engine(embedded_backbone: Backbone) -> Iterator[GistEngine]:
    with GistEngine(embedded_backbone, make_compressor("full", embedded_backbone)) as engine:
        yield engine


@pytest.mark.slow
@pytest.mark.model
class TestRealModel(ChatGistTests, ChatModelIntegrationTests):
    """Invocation, tools and structured output, with SmolLM2-135M-Instruct."""

    @pytest.fixture
    def model(self, real_engine: GistEngine, request: Any) -> BaseChatModel:
        extra = getattr(request, "param", {})
        return ChatGist(engine=real_engine, max_tokens=64, **extra)

    @pytest.mark.xfail(reason="a model of 135M parameters does not call a tool unless it must")
    @pytest.mark.parametrize("model", [{}, {"output_version": "v1"}], indirect=True)
    def test_agent_loop(self, model: BaseChatModel) -> None:
        super().test_agent_loop(model)


class Eager(ChatGist):
    """Calls a tool before it answers, as larger models decide to by themselves."""

    def _turn(self, messages: Any, stop: Any, options: Any, cancel: Any) -> Any:
        asked = isinstance(messages[-1], HumanMessage)
        return super()._turn(
            messages, stop, {**options, "tool_choice": "required" if asked else "auto"}, cancel
        )


@pytest.mark.slow
@pytest.mark.model
@pytest.mark.parametrize("version", ["v0", "v1"])
def test_the_agent_loop_of_a_model_that_calls(real_engine: GistEngine, version: Any) -> None:
    model = Eager(engine=real_engine, max_tokens=64, output_version=version)
    ChatModelIntegrationTests.test_agent_loop(TestRealModel(), model)


@pytest.mark.slow
class TestRetriever(RetrieversIntegrationTests):
    """Retrieval from FAISS with MiniLM, over gists of the tiny model."""

    @pytest.fixture(autouse=True)
    def _rag(self, make_engine: Any, known: list[Passage]) -> None:
        self.rag = GistRAG(make_engine("full"))
        self.rag.build(known)

    @property
    def retriever_constructor(self) -> type[BaseRetriever]:
        return GistRetriever

    @property
    def retriever_constructor_params(self) -> dict[str, Any]:
        return {"rag": self.rag}

    @property
    def retriever_query_example(self) -> str:
        return "When does a COMMIT occur?"
