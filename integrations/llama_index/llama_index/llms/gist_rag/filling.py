"""What fills the store as nodes come by: at ingestion, after retrieval, or unseen by the chain."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal
from uuid import uuid4

from llama_index.core.bridge.pydantic import Field
from llama_index.core.instrumentation import get_dispatcher  # type: ignore[attr-defined]
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events import BaseEvent
from llama_index.core.instrumentation.events.retrieval import RetrievalEndEvent
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import (
    BaseNode,
    MetadataMode,
    NodeWithScore,
    QueryBundle,
    TransformComponent,
)

from gist_rag.aio import run_in_thread
from gist_rag.errors import BadInput, StoreLocked
from llama_index.llms.gist_rag.base import GistLLM

When = Literal["inline", "background"]


class GistTransform(TransformComponent):
    """Compresses nodes as they are ingested; the nodes come out as they went in.

    Stands after the splitter. A pipeline with a cache remembers for which texts and settings it
    ran, not what the store holds: ingest without the cache once if a store's folder was emptied.

    Example:
        >>> IngestionPipeline(transformations=[SentenceSplitter(), GistTransform(llm=llm)])
    """

    llm: GistLLM = Field(description="Whose store is filled.")
    show_progress: bool = Field(
        default=False, description="Whether to show a bar; pipelines do not hand theirs on."
    )
    lock_timeout_s: float = Field(
        default=600.0, ge=0, description="How long to wait while another process writes."
    )
    fingerprint: str = Field(
        default="", description="Tells apart stores that the fields of the LLM do not."
    )

    def __init__(self, **fields: Any) -> None:
        super().__init__(**fields)
        if self.llm.store is None:
            engine = self.llm._engine
            self.fingerprint = f"{engine.store.path} {engine.space}" if engine else uuid4().hex

    @classmethod
    def class_name(cls) -> str:
        return "GistTransform"

    def __getstate__(self) -> dict[str, Any]:
        if self.llm.store is None:
            raise BadInput(
                "GistTransform with num_workers above 1 needs a store that every process can "
                "open: give its GistLLM a model_name and a store folder"
            )
        return super().__getstate__()

    def __call__(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        with_text = [node for node in nodes if node.get_content(MetadataMode.NONE).strip()]
        deadline = time.monotonic() + self.lock_timeout_s
        while with_text:
            try:
                self.llm.precompress(with_text, show_progress=self.show_progress)
            except StoreLocked:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)
            else:
                break
        return nodes

    async def acall(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        return await run_in_thread(lambda _: self(nodes, **kwargs))


class GistNodePostprocessor(BaseNodePostprocessor):
    """Sees that retrieved nodes have gists. Stands last, after whatever changes their text.

    A passage that cannot be compressed is read as text, and the log says why.
    """

    llm: GistLLM = Field(description="Whose store is filled.")
    on_miss: When = Field(
        default="inline",
        description="inline: compress before the question is answered; background: meanwhile.",
    )

    @classmethod
    def class_name(cls) -> str:
        return "GistNodePostprocessor"

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        self.llm.prime(nodes, self.on_miss)
        return nodes


class GistRetrievalHandler(BaseEventHandler):
    """Sees what any retriever returns and has it compressed, without a change to the chain.

    Example:
        >>> get_dispatcher().add_event_handler(GistRetrievalHandler(llm=llm))

    Events come in the thread of the retriever, or in its event loop: ``background`` holds up
    neither, ``inline`` has gists ready for the question at hand. Nodes whose text is changed after
    retrieval need a ``GistNodePostprocessor``.
    """

    llm: GistLLM
    on_miss: When = "background"

    @classmethod
    def class_name(cls) -> str:
        return "GistRetrievalHandler"

    def handle(self, event: BaseEvent, **kwargs: Any) -> None:
        if isinstance(event, RetrievalEndEvent):
            self.llm.prime(event.nodes, self.on_miss)


@contextmanager
def gist_capture(llm: GistLLM, on_miss: When = "background") -> Iterator[GistRetrievalHandler]:
    """A ``GistRetrievalHandler`` for everything that is retrieved inside the ``with``."""
    handler, root = GistRetrievalHandler(llm=llm, on_miss=on_miss), get_dispatcher()
    root.add_event_handler(handler)
    try:
        yield handler
    finally:
        root.event_handlers.remove(handler)
