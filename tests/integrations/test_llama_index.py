"""GistLLM in unmodified LlamaIndex query and chat engines, over a tiny random model."""

from __future__ import annotations

import asyncio
import json
import pickle
from typing import Any

import faiss
import pytest
from llama_index.core import PromptTemplate, StorageContext, VectorStoreIndex
from llama_index.core.base.llms.types import ImageBlock, TextBlock, ThinkingBlock, ToolCallBlock
from llama_index.core.callbacks import CallbackManager, TokenCountingHandler
from llama_index.core.embeddings import MockEmbedding
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.llms import ChatMessage
from llama_index.core.schema import NodeWithScore, TextNode
from llama_index.vector_stores.faiss import FaissVectorStore

from gist_rag.errors import BadInput, GistsRequired
from llama_index.llms.gist_rag import GistLLM, base

QUESTION = "When does a COMMIT occur?"


@pytest.fixture
def llm(engine: Any, prompts: Any) -> GistLLM:
    return GistLLM(engine=engine, max_new_tokens=6)


@pytest.fixture(scope="session")
def nodes(known: Any) -> list[TextNode]:
    return [TextNode(id_=p.id, text=p.text, metadata={"file_name": f"{p.id}.md"}) for p in known]


@pytest.fixture(scope="session")
def index(nodes: list[TextNode]) -> VectorStoreIndex:
    """Equal embeddings for all, so that the first nodes are retrieved."""
    store = FaissVectorStore(faiss_index=faiss.IndexFlatL2(8))
    return VectorStoreIndex(
        nodes,
        storage_context=StorageContext.from_defaults(vector_store=store),
        embed_model=MockEmbedding(embed_dim=8),
    )


@pytest.fixture(scope="session")
def expected(index: VectorStoreIndex) -> list[str]:
    """Ids of what is retrieved for the question, in order."""
    return [n.node_id for n in index.as_retriever(similarity_top_k=3).retrieve(QUESTION)]


@pytest.fixture
def both(known: Any) -> list[ChatMessage]:
    """A conversation with two known passages."""
    return [ChatMessage(f"{known[0].text}\n\n{known[1].text}\n\n{QUESTION}")]


# ---- query engines


@pytest.mark.parametrize(
    "mode", ["compact", "tree_summarize", "compact_accumulate", "simple_summarize"]
)
def test_query_engine_reads_all_gists_in_one_call(
    index: Any, llm: GistLLM, prompts: Any, expected: Any, mode: str
) -> None:
    index.as_query_engine(llm=llm, similarity_top_k=3, response_mode=mode).query(QUESTION)
    assert prompts.gists == [expected]
    assert prompts.no_passage_as_text()


@pytest.mark.parametrize("mode", ["refine", "accumulate"])
def test_query_engine_reads_one_gist_per_call(
    index: Any, llm: GistLLM, prompts: Any, expected: Any, mode: str
) -> None:
    index.as_query_engine(llm=llm, similarity_top_k=3, response_mode=mode).query(QUESTION)
    assert prompts.gists == [[passage] for passage in expected]
    assert prompts.no_passage_as_text()


def test_streaming_query_engine_reads_gists(
    index: Any, llm: GistLLM, prompts: Any, expected: Any
) -> None:
    engine = index.as_query_engine(llm=llm, similarity_top_k=3, streaming=True)
    streamed = list(engine.query(QUESTION).response_gen)
    whole = index.as_query_engine(llm=llm, similarity_top_k=3).query(QUESTION)
    assert "".join(streamed) == whole.response
    assert prompts.gists == [expected] * 2


async def test_awaited_query_engine_reads_gists(
    index: Any, llm: GistLLM, prompts: Any, expected: Any
) -> None:
    engine = index.as_query_engine(llm=llm, similarity_top_k=3)
    await asyncio.gather(*(engine.aquery(QUESTION) for _ in range(3)))
    assert prompts.gists == [expected] * 3


def test_query_engine_completes_raw_prompts(
    index: Any, engine: Any, prompts: Any, expected: Any
) -> None:
    llm = GistLLM(engine=engine, max_new_tokens=6, is_chat_model=False)
    index.as_query_engine(llm=llm, similarity_top_k=3).query(QUESTION)
    assert prompts.gists == [expected]
    assert "<|im_start|>" not in prompts.texts[0]


@pytest.mark.parametrize("mode", ["context", "condense_plus_context"])
def test_chat_engine_reads_gists_in_each_turn(
    index: Any, llm: GistLLM, prompts: Any, expected: Any, mode: str
) -> None:
    chat = index.as_chat_engine(chat_mode=mode, llm=llm, similarity_top_k=3)
    chat.chat(QUESTION)
    list(chat.stream_chat("And then?").response_gen)
    assert [found for found in prompts.gists if found] == [expected] * 2
    assert prompts.no_passage_as_text()


def test_prompt_helper_plans_for_the_real_window(index: Any, llm: GistLLM, prompts: Any) -> None:
    assert llm.metadata.context_window == llm.engine.backbone.max_positions
    llm.context_window = 900
    index.as_query_engine(llm=llm, similarity_top_k=8).query(QUESTION)
    assert len(prompts.gists) > 1


# ---- the four ways to ask, awaited and not


async def test_all_ways_to_ask_agree(llm: GistLLM, both: Any) -> None:
    whole = llm.chat(both)
    streamed = list(llm.stream_chat(both))
    awaited = await llm.achat(both)
    stream = [r async for r in await llm.astream_chat(both)]
    assert whole.message.content == awaited.message.content
    for responses in (streamed, stream):
        assert responses[-1].message.content == whole.message.content
        assert "".join(r.delta for r in responses) == whole.message.content
        assert responses[-1].raw["usage"] == whole.raw["usage"] == whole.additional_kwargs
        assert [bool(r.raw) for r in responses].count(True) == 1


async def test_all_ways_to_complete_agree(llm: GistLLM, both: Any) -> None:
    prompt = both[0].content
    whole = llm.complete(prompt)
    assert whole.raw["gist"]["hits"] == 2
    assert (await llm.acomplete(prompt)).text == whole.text
    assert [r.text for r in llm.stream_complete(prompt)][-1] == whole.text
    assert [r.text async for r in await llm.astream_complete(prompt)][-1] == whole.text


def test_completion_prompt_is_wrapped_unless_formatted(engine: Any, prompts: Any) -> None:
    llm = GistLLM(engine=engine, max_new_tokens=2, completion_to_prompt=lambda p: f"Q: {p}\nA:")
    llm.complete("Why?")
    llm.complete("Why?", formatted=True)
    list(llm.stream_complete("Why?"))
    assert prompts.texts == ["Q: Why?\nA:", "Why?", "Q: Why?\nA:"]


def test_messages_to_prompt_replaces_the_chat_template(engine: Any, prompts: Any) -> None:
    llm = GistLLM(engine=engine, max_new_tokens=2, messages_to_prompt=lambda m: m[0].content)
    llm.chat([ChatMessage("Why?")])
    assert prompts.texts == ["Why?"]


def test_system_prompt_is_read(engine: Any, prompts: Any) -> None:
    llm = GistLLM(engine=engine, max_new_tokens=2, system_prompt="Be brief.")
    llm.predict(PromptTemplate("Why?"))
    assert prompts.texts[0].startswith("<|im_start|>system\nBe brief.<|im_end|>")


def test_usage_counts_positions_and_passages(llm: GistLLM, both: Any) -> None:
    response = llm.chat(both)
    usage, gist = response.raw["usage"], response.raw["gist"]
    assert usage["completion_tokens"] == 6
    assert usage["total_tokens"] == usage["prompt_tokens"] + 6
    assert usage["gist_passages"] == gist["hits"] == len(gist["passages"]) == 2
    assert gist["ratio"] == pytest.approx(usage["gist_source_tokens"] / usage["gist_tokens"], 0.02)
    full = llm.chat(both, gist_mode="off").raw["usage"]
    saved = usage["gist_source_tokens"] - usage["gist_tokens"]
    assert full["prompt_tokens"] - usage["prompt_tokens"] == pytest.approx(saved, abs=3)


# ---- async


async def test_loop_goes_on_during_an_answer(llm: GistLLM, both: Any) -> None:
    ticks = 0
    task = asyncio.create_task(llm.achat(both, max_tokens=64))
    while not task.done():
        await asyncio.sleep(0.002)
        ticks += 1
    assert ticks > 10


async def test_leaving_a_stream_stops_generation(
    llm: GistLLM, both: Any, stream_ends: list[int]
) -> None:
    stream = await llm.astream_chat(both, max_tokens=1000)
    await anext(stream)
    await stream.aclose()
    for _ in range(200):
        await asyncio.sleep(0.01)
        if stream_ends:
            break
    assert stream_ends[0] < 10


async def test_error_in_a_worker_reaches_the_caller(llm: GistLLM) -> None:
    hello = [ChatMessage("Hello")]
    with pytest.raises(GistsRequired):
        await llm.achat(hello, gist_mode="require")
    stream = await llm.astream_chat(hello, gist_mode="require")
    with pytest.raises(GistsRequired):
        await anext(stream)


# ---- events


def test_each_call_is_one_event_with_its_usage(llm: GistLLM, both: Any) -> None:
    names: list[str] = []

    class Names(BaseEventHandler):
        def handle(self, event: Any, **_: Any) -> None:
            names.append(type(event).__name__)

    counter, handler, root = TokenCountingHandler(), Names(), get_dispatcher()
    llm.callback_manager = CallbackManager([counter])
    root.add_event_handler(handler)
    try:
        usage = llm.chat(both).raw["usage"]
        list(llm.stream_chat(both))
    finally:
        root.event_handlers.remove(handler)
    assert (names.count("LLMChatStartEvent"), names.count("LLMChatEndEvent")) == (2, 2)
    assert counter.prompt_llm_token_count == 2 * usage["prompt_tokens"]
    assert counter.completion_llm_token_count == 12


# ---- options


def test_stop_string_ends_the_answer(llm: GistLLM, both: Any) -> None:
    whole = llm.chat(both, max_tokens=24).message.content
    stop = whole[8:10]
    response = llm.chat(both, max_tokens=24, stop=[stop])
    assert response.message.content == whole[: whole.index(stop)]
    assert response.raw["finish_reason"] == "stop"


def test_options_of_a_call_win_over_generate_kwargs(engine: Any, both: Any) -> None:
    llm = GistLLM(engine=engine, generate_kwargs={"max_tokens": 3, "gist_mode": "off"})
    assert llm.chat(both).raw["usage"]["completion_tokens"] == 3
    assert llm.chat(both).raw["usage"]["gist_passages"] == 0
    assert llm.chat(both, max_tokens=2).raw["usage"]["completion_tokens"] == 2


def test_require_refuses_a_prompt_without_gists(engine: Any, both: Any) -> None:
    llm = GistLLM(engine=engine, max_new_tokens=2, gist_mode="require")
    assert llm.chat(both).raw["gist"]["hits"] == 2
    with pytest.raises(GistsRequired):
        llm.chat([ChatMessage("What is SQLite?")])


def test_unknown_names_are_warned_of(llm: GistLLM, engine: Any) -> None:
    with pytest.warns(UserWarning, match="GistLLM does not know modle"):
        GistLLM(engine=engine, modle="x")
    with pytest.warns(UserWarning, match="call does not know do_sample"):
        llm.complete("Hello", do_sample=True)


def test_engine_brings_its_own_settings(engine: Any) -> None:
    assert GistLLM(engine=engine).model_name == "tiny-llama"
    with pytest.raises(BadInput, match="brings its own ratio, store"):
        GistLLM(engine=engine, store="elsewhere", ratio=8)


# ---- messages


def test_blocks_are_read_as_text(llm: GistLLM, prompts: Any, known: Any) -> None:
    call = ToolCallBlock(tool_name="search", tool_kwargs={"query": "wal"})
    llm.chat(
        [
            ChatMessage(role="developer", content="Be brief."),
            ChatMessage(role="assistant", blocks=[ThinkingBlock(content="hm"), call]),
            ChatMessage(role="tool", blocks=[TextBlock(text=t) for t in ("Found:", known[0].text)]),
        ]
    )
    assert prompts.gists == [[known[0].id]]
    assert '{"name": "search", "arguments": {"query": "wal"}}' in prompts.texts[0]
    assert prompts.texts[0].startswith("<|im_start|>system\nBe brief.")
    assert "hm" not in prompts.texts[0]


def test_other_blocks_are_refused_by_name(llm: GistLLM) -> None:
    image = ImageBlock(url="http://localhost/x.png")
    with pytest.raises(BadInput, match="image"):
        llm.chat([ChatMessage(blocks=[image])])


# ---- filling, explaining, saving


def test_precompress_takes_nodes_and_texts(make_engine: Any, nodes: Any, known: Any) -> None:
    llm = GistLLM(engine=make_engine(settings={"ratio": 4}), max_new_tokens=4)
    done = llm.precompress([nodes[0], NodeWithScore(node=nodes[1]), known[2].text])
    again = llm.precompress(nodes[:3], show_progress=True)
    assert (done.written, again.written, again.skipped) == (3, 0, 3)
    response = llm.chat([ChatMessage("\n\n".join(p.text for p in known[:2]))])
    assert response.raw["gist"]["passages"] == [nodes[0].node_id, nodes[1].node_id]


def test_explain_shows_what_would_be_read(llm: GistLLM, both: Any) -> None:
    kinds = [type(segment).__name__ for segment in llm.explain(both)]
    assert kinds == ["Text", "Known", "Text", "Known", "Text"]
    assert len(llm.explain(both[0].content, gist_mode="off")) == 1


def test_saved_form_is_json_and_comes_back(
    engine: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = GistLLM(store=tmp_path, ratio=8)
    saved = json.loads(json.dumps(llm.to_dict()))
    assert saved["class_name"] == "GistLLM"
    assert GistLLM.from_dict(saved).to_dict() == llm.to_dict()
    monkeypatch.setattr(base.GistLLM, "_build_engine", lambda _self: engine)
    assert llm.engine is engine
    assert pickle.loads(pickle.dumps(llm)).ratio == 8
