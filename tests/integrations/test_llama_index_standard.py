"""What a local LLM of LlamaIndex should do, over a tiny random model and over the embedded one.

LlamaIndex has no standard tests for LLMs. These ask for what its own base classes, engines and
handlers promise to their users, and know no gists; ``benchmarks/serving/llama_index_suite.py`` runs
them on ``HuggingFaceLLM``, too.
"""

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

import pytest
from llama_index.core import Document, PromptTemplate, SummaryIndex
from llama_index.core.base.llms.base import BaseLLM
from llama_index.core.base.llms.types import ThinkingBlock
from llama_index.core.callbacks import CallbackManager, TokenCountingHandler
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.llms import ChatMessage
from llama_index.core.llms.llm import LLM
from llama_index.core.tools import FunctionTool
from pydantic import BaseModel, Field

from gist_rag.backbone import Backbone
from gist_rag.compressors import make_compressor
from gist_rag.engine import GistEngine
from llama_index.llms.gist_rag import GistLLM

PROMPT = "When does a COMMIT occur?"
CHAT = [ChatMessage("Be brief.", role="system"), ChatMessage(PROMPT)]
WAIT_S = 30


class Step(BaseModel):
    """One step."""

    side: Literal["left", "right"]
    far: bool = Field(description="whether it is far")


def go(side: Literal["left", "right"]) -> str:
    """Go to a side."""
    return f"went {side}"


class LLMContract:
    """Subclasses give two fixtures: ``make_llm``, which takes fields of the class, and ``model``,
    the causal LM of transformers behind it."""

    max_new_tokens = 12
    long = 150
    """Tokens of an answer that is broken off."""
    bad_fields: ClassVar[dict[str, Any]]
    """What makes generating fail."""

    @pytest.fixture(autouse=True)
    def _count_passes(self, model: Any) -> Iterator[None]:
        self.passes = 0

        def count(*_: Any) -> None:
            self.passes += 1

        hook = model.model.register_forward_pre_hook(count)
        yield
        hook.remove()

    @pytest.fixture
    def llm(self, make_llm: Callable[..., LLM]) -> LLM:
        return make_llm()

    # ---- what it says of itself

    def test_is_an_llm(self, llm: LLM) -> None:
        assert isinstance(llm, BaseLLM)
        assert llm.class_name()

    def test_metadata_tells_the_window_and_the_longest_answer(self, llm: LLM, model: Any) -> None:
        assert llm.metadata.context_window == model.config.max_position_embeddings
        assert llm.metadata.num_output == self.max_new_tokens

    def test_saved_form_is_json(self, llm: LLM) -> None:
        assert json.loads(json.dumps(llm.to_dict()))["class_name"] == llm.class_name()

    # ---- the ways to ask

    def test_chat_and_complete_answer(self, llm: LLM) -> None:
        assert llm.chat(CHAT).message.content
        assert llm.complete(PROMPT).text

    def test_streams_join_to_the_answer(self, llm: LLM) -> None:
        chat, completion = list(llm.stream_chat(CHAT)), list(llm.stream_complete(PROMPT))
        assert len(chat) > 2
        assert "".join(r.delta or "" for r in chat) == llm.chat(CHAT).message.content
        assert chat[-1].message.content == llm.chat(CHAT).message.content
        assert completion[-1].text == llm.complete(PROMPT).text

    async def test_awaited_answers_are_the_same(self, llm: LLM) -> None:
        assert (await llm.achat(CHAT)).message.content == llm.chat(CHAT).message.content
        assert (await llm.acomplete(PROMPT)).text == llm.complete(PROMPT).text

    async def test_awaited_streams_are_the_same(self, llm: LLM) -> None:
        pieces = [r async for r in await llm.astream_chat(CHAT)]
        assert "".join(r.delta or "" for r in pieces) == llm.chat(CHAT).message.content
        *_, last = [r async for r in await llm.astream_complete(PROMPT)]
        assert last.text == llm.complete(PROMPT).text

    def test_predict_fills_the_prompt(self, llm: LLM) -> None:
        asked = PromptTemplate("When does a {what} occur?")
        assert llm.predict(asked, what="COMMIT") == llm.chat([ChatMessage(PROMPT)]).message.content

    def test_a_system_prompt_is_read(self, make_llm: Callable[..., LLM]) -> None:
        plain, told = make_llm(), make_llm(system_prompt="Answer in French, in one word.")
        question = PromptTemplate(PROMPT)
        assert plain.predict(question) != told.predict(question)

    @pytest.mark.parametrize("way", ["complete", "stream_complete"])
    def test_completion_to_prompt_is_applied(self, make_llm: Callable[..., LLM], way: str) -> None:
        asked: list[str] = []

        def wrapped(prompt: str) -> str:
            asked.append(prompt)
            return f"Q: {prompt}\nA:"

        answer = getattr(make_llm(completion_to_prompt=wrapped), way)(PROMPT)
        if way != "complete":
            list(answer)
        assert asked == [PROMPT]

    def test_thoughts_in_a_message_do_no_harm(self, llm: LLM) -> None:
        thought = ChatMessage(role="assistant", blocks=[ThinkingBlock(content="hm")])
        assert llm.chat([*CHAT, thought, ChatMessage("And then?")]).message.content

    # ---- options of one call

    def test_a_call_may_set_its_longest_answer(self, llm: LLM) -> None:
        short, whole = llm.complete(PROMPT, max_tokens=2).text, llm.complete(PROMPT).text
        assert whole.startswith(short)
        assert len(short) < len(whole)

    def test_a_call_may_set_stop_strings(self, llm: LLM) -> None:
        whole = llm.complete(PROMPT).text
        stop = whole[8:11]
        assert llm.complete(PROMPT, stop=[stop]).text == whole[: whole.index(stop)]

    # ---- what goes wrong

    def test_an_error_while_it_streams_reaches_the_reader(
        self, make_llm: Callable[..., LLM]
    ) -> None:
        """In a thread, so that a stream that hangs fails this test alone."""
        llm, ended = make_llm(**self.bad_fields), []

        def read() -> None:
            try:
                ended.append(list(llm.stream_complete(PROMPT)))
            except Exception as error:
                ended.append(error)

        thread = threading.Thread(target=read, daemon=True)
        thread.start()
        thread.join(WAIT_S)
        assert isinstance(ended[0] if ended else None, Exception)

    # ---- threads and the event loop

    def test_threads_get_the_answers_of_one(self, llm: LLM) -> None:
        asked = [f"{PROMPT} Part {i}." for i in range(6)]
        alone = [llm.complete(prompt).text for prompt in asked]
        with ThreadPoolExecutor(6) as pool:
            assert [r.text for r in pool.map(llm.complete, asked)] == alone

    @pytest.mark.parametrize("way", ["achat", "astream_chat"])
    async def test_the_loop_goes_on_during_an_answer(self, llm: LLM, way: str) -> None:
        async def ask() -> None:
            answer = await getattr(llm, way)(CHAT)
            if way != "achat":
                [piece async for piece in answer]

        ticks, task = 0, asyncio.create_task(ask())
        while not task.done():
            await asyncio.sleep(0.002)
            ticks += 1
        assert ticks > 5

    async def test_a_cancelled_task_stops_the_model(self, make_llm: Callable[..., LLM]) -> None:
        llm = make_llm(max_new_tokens=self.long)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(llm.achat(CHAT), 0.2)
        await self.stands_still()

    async def test_a_stream_that_is_left_stops_the_model(
        self, make_llm: Callable[..., LLM]
    ) -> None:
        stream = await make_llm(max_new_tokens=self.long).astream_chat(CHAT)
        await anext(stream)
        await stream.aclose()
        await self.stands_still()

    async def stands_still(self) -> None:
        """Soon the model does nothing more, and it has not written all that it was to."""
        before, deadline = -1, time.monotonic() + WAIT_S
        while self.passes != before and time.monotonic() < deadline:
            before = self.passes
            await asyncio.sleep(1.0)
        assert before == self.passes < 0.9 * self.long

    # ---- events and counting

    @pytest.mark.parametrize("way", ["chat", "complete"])
    def test_one_call_is_one_event(self, llm: LLM, way: str) -> None:
        with _events() as names:
            getattr(llm, way)(CHAT if way == "chat" else PROMPT)
        assert len([n for n in names if n.startswith("LLM") and n.endswith("StartEvent")]) == 1

    def test_tokens_are_counted_once(self, llm: LLM) -> None:
        counter = TokenCountingHandler(tokenizer=str.split)
        llm.callback_manager = CallbackManager([counter])
        llm.chat(CHAT)
        assert len(counter.llm_token_counts) == 1

    def test_usage_is_told(self, llm: LLM) -> None:
        usage = (llm.chat(CHAT).raw or {}).get("usage")
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
        assert 0 < usage["completion_tokens"] <= self.max_new_tokens

    # ---- engines, tools, structure

    @pytest.mark.parametrize("mode", ["compact", "refine", "tree_summarize", "simple_summarize"])
    def test_query_engines_answer(self, llm: LLM, mode: Any) -> None:
        index = SummaryIndex.from_documents([Document(text=f"Part {i}.") for i in range(3)])
        assert str(index.as_query_engine(llm=llm, response_mode=mode).query(PROMPT))

    def test_a_required_tool_is_called(self, llm: Any) -> None:
        tools = [FunctionTool.from_defaults(go)]
        response = llm.chat_with_tools(tools, user_msg="Where to?", tool_required=True)
        [call] = llm.get_tool_calls_from_response(response)
        assert (call.tool_name, call.tool_kwargs["side"] in ("left", "right")) == ("go", True)

    def test_structured_prediction_gives_the_class(self, llm: LLM) -> None:
        assert isinstance(llm.structured_predict(Step, PromptTemplate("Which side?")), Step)

    async def test_structured_llm_gives_the_class_when_awaited(self, llm: LLM) -> None:
        response = await llm.as_structured_llm(Step).achat([ChatMessage("Which side?")])
        assert isinstance(response.raw, Step)


@contextmanager
def _events() -> Iterator[list[str]]:
    """Names of the events inside the ``with``."""
    names: list[str] = []

    class Names(BaseEventHandler):
        def handle(self, event: Any, **_: Any) -> None:
            names.append(type(event).__name__)

    handler, root = Names(), get_dispatcher()
    root.add_event_handler(handler)
    try:
        yield names
    finally:
        root.event_handlers.remove(handler)


class GistLLMContract(LLMContract):
    bad_fields: ClassVar[dict[str, Any]] = {"generate_kwargs": {"temperature": -1.0}}

    @pytest.fixture
    def make_llm(self, asked: GistEngine) -> Callable[..., GistLLM]:
        return lambda **fields: GistLLM(
            engine=asked, **{"max_new_tokens": self.max_new_tokens} | fields
        )

    @pytest.fixture
    def model(self, asked: GistEngine) -> Any:
        return asked.backbone.model


@pytest.fixture(scope="module")
def embedded_engine(embedded_backbone: Backbone) -> Iterator[GistEngine]:
    with GistEngine(embedded_backbone, make_compressor("full", embedded_backbone)) as engine:
        yield engine


class TestTinyModel(GistLLMContract):
    max_new_tokens = 96  # as many as JSON of a random model takes
    long = 2000

    @pytest.fixture
    def asked(self, engine: GistEngine) -> GistEngine:
        return engine


@pytest.mark.slow
@pytest.mark.model
class TestRealModel(GistLLMContract):
    max_new_tokens = 32

    @pytest.fixture
    def asked(self, embedded_engine: GistEngine) -> GistEngine:
        return embedded_engine
