"""Without gists both classes are plain transformers, token for token, with the embedded model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from langchain_core.messages import HumanMessage, SystemMessage
from llama_index.core.llms import ChatMessage

from gist_rag.backbone import Backbone
from gist_rag.compressors import make_compressor
from gist_rag.engine import GistEngine
from gist_rag.models import load_model
from gist_rag.prompt import rag_messages
from gist_rag.types import Message, Passage
from langchain_gist_rag import ChatGist
from llama_index.llms.gist_rag import GistLLM

pytestmark = [pytest.mark.slow, pytest.mark.model]

SYSTEM = "Answer in one sentence."
MAX_TOKENS = 24
Ask = Callable[[GistEngine, list[Message], str], tuple[str, int]]


@pytest.fixture(scope="module")
def plain() -> Callable[[list[Message]], tuple[str, int]]:
    """What transformers generates by itself: the text, and how many tokens before its end."""
    model, tokenizer = load_model()

    def generate(messages: list[Message]) -> tuple[str, int]:
        given: Any = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with torch.no_grad():
            whole = model.generate(**given, max_new_tokens=MAX_TOKENS, do_sample=False)
        written = whole[0, given["input_ids"].shape[1] :]
        return tokenizer.decode(written, skip_special_tokens=True), len(written)

    return generate


@pytest.fixture(scope="module")
def engine(embedded_backbone: Backbone, passages: list[Passage]) -> Iterator[GistEngine]:
    """With gists of the first two passages."""
    compressor = make_compressor("attention_matching", embedded_backbone, {"preset": "fast"})
    with GistEngine(embedded_backbone, compressor) as engine:
        engine.precompute(passages[:2])
        yield engine


def langchain(engine: GistEngine, messages: list[Message], mode: str) -> tuple[str, int]:
    llm = ChatGist(engine=engine, max_tokens=MAX_TOKENS)
    kinds: dict[str, Any] = {"system": SystemMessage, "user": HumanMessage}
    said = llm.invoke([kinds[m["role"]](m["content"]) for m in messages], gist_mode=mode)
    assert said.response_metadata["gist"]["hits"] == 0
    return str(said.content), said.usage_metadata["output_tokens"]  # type: ignore[index]


def llama_index(engine: GistEngine, messages: list[Message], mode: str) -> tuple[str, int]:
    llm = GistLLM(engine=engine, max_new_tokens=MAX_TOKENS)
    asked = [ChatMessage(m["content"], role=m["role"]) for m in messages]
    raw: Any = (said := llm.chat(asked, gist_mode=mode)).raw
    assert raw["gist"]["hits"] == 0
    return said.message.content or "", raw["usage"]["completion_tokens"]


@pytest.mark.parametrize("ask", [langchain, llama_index])
@pytest.mark.parametrize(
    ("mode", "first", "last"),
    [("off", 0, 2), ("auto", 20, 22), ("auto", 0, 0)],
    ids=["off, known passages", "on, unknown passages", "on, no passage"],
)
def test_answers_are_those_of_plain_transformers(
    engine: GistEngine,
    plain: Callable[[list[Message]], tuple[str, int]],
    passages: list[Passage],
    ask: Ask,
    mode: str,
    first: int,
    last: int,
) -> None:
    texts = [p.text for p in passages[first:last]]
    asked = rag_messages("What happens when a transaction commits?", texts)
    for messages in (asked, [Message(role="system", content=SYSTEM), *asked]):
        assert ask(engine, messages, mode) == plain(messages)
