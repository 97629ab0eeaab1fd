"""LangChain's own tests for chat models."""

from __future__ import annotations

import pytest
from langchain_core.language_models import BaseChatModel
from langchain_tests.integration_tests import ChatModelIntegrationTests
from langchain_tests.unit_tests import ChatModelUnitTests

from gist_rag.engine import GistEngine
from langchain_gist_rag import ChatGist


class ChatGistTests:
    """What ``ChatGist`` can do."""

    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatGist

    @property
    def has_tool_calling(self) -> bool:
        return False

    @property
    def has_structured_output(self) -> bool:
        return False

    @property
    def supports_model_override(self) -> bool:
        return False


@pytest.mark.filterwarnings("ignore:ChatGist does not know api_key")
class TestUnit(ChatGistTests, ChatModelUnitTests):
    """Construction; no engine is ever built."""


class TestIntegration(ChatGistTests, ChatModelIntegrationTests):
    """Invocation, over the tiny random model."""

    @pytest.fixture
    def model(self, engine: GistEngine) -> BaseChatModel:
        return ChatGist(engine=engine, max_tokens=8)
