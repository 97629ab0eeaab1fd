"""``GistMiddleware``: what an agent retrieves is read as gists, by tools and prompts alike."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, NotRequired, TypedDict

from langchain.agents.middleware import (
    AgentMiddleware,
    AgentState,
    ModelRequest,
    ModelResponse,
    ToolCallRequest,
)
from langchain_core.messages import AIMessage, ToolMessage
from langgraph.runtime import Runtime
from langgraph.types import Command

from gist_rag.modes import OnMiss
from langchain_gist_rag.priming import gist_capture


class GistUsage(TypedDict):
    """What a conversation has read as gists, over all calls of its model."""

    hits: int
    misses: int
    gist_tokens: int
    source_tokens: int


class GistAgentState(AgentState[Any]):
    """The state of an agent, with what it has read as gists."""

    gist: NotRequired[GistUsage]


class GistMiddleware(AgentMiddleware[GistAgentState, Any, Any]):
    """Compresses what an agent retrieves before its model reads it, and counts what was saved.

    It sees what retrievers return inside tools and inside the middleware that stands after it (so
    it stands first), and the documents that tools hand over as artifacts. Messages stay as they
    are. A tool or prompt that calls ``vector_store.similarity_search`` itself, and hands over no
    artifact, tells nobody what a document is: its text is recognised if it is known, and no more.

    Example:
        >>> agent = create_agent(llm, [search], middleware=[GistMiddleware(llm)])
        >>> agent.invoke({"messages": [("human", question)]})["gist"]
        {'hits': 3, 'misses': 0, 'gist_tokens': 71, 'source_tokens': 562}

    Args:
        llm: the ``ChatGist`` of the agent, or its ``GistEngine``.
        on_miss: ``inline`` compresses at once; ``background`` for the next call of the model, which
            reads the same messages again.
    """

    state_schema = GistAgentState

    def __init__(self, llm: Any, on_miss: OnMiss = "inline") -> None:
        super().__init__()
        self.llm = llm
        self.on_miss: OnMiss = on_miss

    def wrap_tool_call(
        self,
        request: ToolCallRequest,
        handler: Callable[[ToolCallRequest], ToolMessage | Command[Any]],
    ) -> ToolMessage | Command[Any]:
        with gist_capture(self.llm, self.on_miss):
            return handler(request)

    async def awrap_tool_call(
        self,
        request: ToolCallRequest,
        handler: Callable[[ToolCallRequest], Awaitable[ToolMessage | Command[Any]]],
    ) -> ToolMessage | Command[Any]:
        with gist_capture(self.llm, self.on_miss):
            return await handler(request)

    def wrap_model_call(
        self,
        request: ModelRequest[Any],
        handler: Callable[[ModelRequest[Any]], ModelResponse[Any]],
    ) -> ModelResponse[Any]:
        with gist_capture(self.llm, self.on_miss):
            return handler(request)

    async def awrap_model_call(
        self,
        request: ModelRequest[Any],
        handler: Callable[[ModelRequest[Any]], Awaitable[ModelResponse[Any]]],
    ) -> ModelResponse[Any]:
        with gist_capture(self.llm, self.on_miss):
            return await handler(request)

    def after_model(self, state: GistAgentState, runtime: Runtime[Any]) -> dict[str, Any] | None:
        """Add the last answer's report to the state's."""
        said = next((m for m in reversed(state["messages"]) if isinstance(m, AIMessage)), None)
        report = said.response_metadata.get("gist") if said else None
        if report is None:
            return None
        before = state.get("gist", {})
        return {"gist": {k: before.get(k, 0) + report[k] for k in GistUsage.__annotations__}}
