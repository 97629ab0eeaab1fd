"""Gists in words: for this engine (``gist_mode="text"``) and before other chat models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from langchain_core.language_models import FakeMessagesListChatModel
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.prompts import ChatPromptTemplate
from llama_index.core.llms import ChatMessage

from gist_rag.engine import GistEngine
from gist_rag.types import GistKey, Passage
from langchain_gist_rag import ChatGist
from llama_index.llms.gist_rag import GistLLM

QUESTION = "\n\nWhen does a COMMIT occur?"


@pytest.fixture
def worded(make_engine: Callable[..., GistEngine], passages: list[Passage]) -> GistEngine:
    engine = make_engine("gist_coco", settings={"ratio": 4, "verbalise": 6})
    engine.precompute(passages[:2])
    return engine


@pytest.fixture
def words(worded: GistEngine, passages: list[Passage]) -> str:
    """What the first passage's gist says."""
    [state] = worded.store.fetch([GistKey(worded.space, passages[0].content)])
    assert state is not None
    assert state.text
    return state.text


def test_the_engine_reads_words_in_place_of_passages(
    worded: GistEngine, passages: list[Passage], words: str
) -> None:
    unknown = passages[5].text
    prompt = f"{passages[0].text}\n\n{unknown}{QUESTION}"
    [segment] = worded.segments(prompt, "text")
    assert segment.text == f"{words}\n\n{unknown}{QUESTION}"
    answer = worded.generate(prompt, gist_mode="text")
    assert answer.text == worded.generate(segment.text, gist_mode="off").text
    assert answer.stats.hits == 0


def test_what_a_model_said_is_left_alone(
    worded: GistEngine, passages: list[Passage], words: str
) -> None:
    text = passages[0].text
    messages = [{"role": role, "content": text} for role in ("user", "assistant", "tool")]
    assert [m["content"] for m in worded.in_words(messages)] == [words, text, words]
    assert messages[0]["content"] == text


def test_gists_without_words_stay_passages(engine: Any, known: list[Passage]) -> None:
    assert engine.in_words(known[0].text + QUESTION) == known[0].text + QUESTION


def test_before_any_chat_model_of_langchain(
    worded: GistEngine, passages: list[Passage], words: str
) -> None:
    sent: list[Any] = []

    class Remote(FakeMessagesListChatModel):
        def _generate(self, messages: Any, *args: Any, **kwargs: Any) -> Any:
            sent.extend(messages)
            return super()._generate(messages, *args, **kwargs)

    prompt = ChatPromptTemplate.from_messages(
        [("system", "Answer from: {context}"), AIMessage(passages[0].text), ("human", "{input}")]
    )
    remote = Remote(responses=[AIMessage("At the end.")])
    chain = prompt | ChatGist(engine=worded).in_words() | remote
    answer = chain.invoke({"context": passages[0].text, "input": QUESTION})
    assert answer.content == "At the end."
    assert [m.content for m in sent] == [f"Answer from: {words}", passages[0].text, QUESTION]
    image = HumanMessage([{"type": "image_url", "image_url": {"url": "http://x/y.png"}}])
    assert ChatGist(engine=worded).in_words().invoke([image]) == [image]


def test_before_any_llm_of_llama_index(
    worded: GistEngine, passages: list[Passage], words: str
) -> None:
    text = passages[0].text
    messages = [ChatMessage(text + QUESTION), ChatMessage(text, role="assistant")]
    read = GistLLM(engine=worded).in_words(messages)
    assert [m.content for m in read] == [words + QUESTION, text]
    assert messages[0].content == text + QUESTION
