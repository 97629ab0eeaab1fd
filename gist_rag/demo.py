"""``gist-rag demo``: the shipped sample, asked through LangChain and through LlamaIndex.

The one file of the package that imports the integrations: showing them is what it is for.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass

from gist_rag.engine import Chunk, GistEngine, Prompt, Request
from gist_rag.errors import MissingExtra
from gist_rag.models import embedder_folder
from gist_rag.prompt import RAG_DOCUMENTS, RAG_QUESTION, RAG_SEPARATOR
from gist_rag.sample import sample_questions
from gist_rag.types import Answer, Passage, Sampling

QUESTIONS = ("sqlite-q03", "sqlite-q11", "sqlite-q13")
"""Picked from those that so small a model answers from text. They show how it works; how well it
answers is what ``gist-rag evaluate`` measures."""
RETRIEVED = 2
MAX_TOKENS = 32


@dataclass(frozen=True)
class Shown:
    """One question: what the framework answered from gists, and the same prompt read as text.

    ``gist_ms`` and ``text_ms`` are the times to the first token.
    """

    framework: str
    question: str
    gold: str
    answer: str
    text_answer: str
    retrieved: int
    read_as_gists: int
    gist_ms: float
    text_ms: float


class DemoEngine(GistEngine):
    """An engine that remembers the last prompt a framework sent, and its answer."""

    last: tuple[Prompt, Answer]

    def _run(self, requests: Sequence[Request]) -> Generator[list[tuple[int, Chunk]]]:
        for pieces in super()._run(requests):
            for place, chunk in pieces:
                if chunk.answer is not None:
                    self.last = (requests[place].prompt, chunk.answer)
            yield pieces


def run(engine: DemoEngine, passages: Sequence[Passage]) -> Iterator[Shown]:
    """Ask the demo's questions through each framework.

    Raises:
        MissingExtra: a framework is not installed.
    """
    texts = [passage.text for passage in passages]
    for framework, connect in (("LangChain", _langchain), ("LlamaIndex", _llama_index)):
        try:
            ask = connect(engine, texts)
        except ImportError as error:
            raise MissingExtra(error.name or framework, "demo") from error
        for question in sample_questions():
            if question.id not in QUESTIONS:
                continue
            answer = ask(question.text)
            prompt, read = engine.last
            as_text = engine.generate(prompt, Sampling(max_tokens=MAX_TOKENS), gist_mode="off")
            yield Shown(
                framework=framework,
                question=question.text,
                gold=question.answers[0],
                answer=answer.strip(),
                text_answer=as_text.text.strip(),
                retrieved=RETRIEVED,
                read_as_gists=read.stats.hits,
                gist_ms=round(read.stats.first_token_ms, 1),
                text_ms=round(as_text.stats.first_token_ms, 1),
            )


def _langchain(engine: GistEngine, texts: list[str]) -> Callable[[str], str]:
    """A chain as LangChain's users write it, with ``ChatGist`` as its model."""
    from langchain_community.vectorstores import FAISS
    from langchain_core.documents import Document
    from langchain_core.output_parsers import StrOutputParser
    from langchain_core.prompts import ChatPromptTemplate
    from langchain_core.runnables import RunnablePassthrough
    from langchain_huggingface import HuggingFaceEmbeddings

    from langchain_gist_rag import ChatGist

    def join(documents: Sequence[Document]) -> str:
        return RAG_SEPARATOR.join(document.page_content for document in documents)

    embeddings = HuggingFaceEmbeddings(model_name=embedder_folder())
    retriever = FAISS.from_texts(texts, embeddings).as_retriever(search_kwargs={"k": RETRIEVED})
    prompt = ChatPromptTemplate.from_template(RAG_DOCUMENTS + RAG_QUESTION)
    chain = (
        {"passages": retriever | join, "question": RunnablePassthrough()}
        | prompt
        | ChatGist(engine=engine, max_tokens=MAX_TOKENS)
        | StrOutputParser()
    )
    return chain.invoke


def _llama_index(engine: GistEngine, texts: list[str]) -> Callable[[str], str]:
    """A query engine as LlamaIndex's users write it, with ``GistLLM`` as its model."""
    import faiss
    from llama_index.core import StorageContext, VectorStoreIndex
    from llama_index.core.schema import TextNode
    from llama_index.embeddings.huggingface import HuggingFaceEmbedding
    from llama_index.vector_stores.faiss import FaissVectorStore

    from llama_index.llms.gist_rag import GistLLM

    embedding = HuggingFaceEmbedding(model_name=embedder_folder())
    dimension = len(embedding.get_text_embedding("SQLite"))
    vectors = FaissVectorStore(faiss_index=faiss.IndexFlatIP(dimension))
    index = VectorStoreIndex(
        [TextNode(text=text) for text in texts],
        storage_context=StorageContext.from_defaults(vector_store=vectors),
        embed_model=embedding,
    )
    query_engine = index.as_query_engine(
        llm=GistLLM(engine=engine, max_new_tokens=MAX_TOKENS), similarity_top_k=RETRIEVED
    )
    return lambda question: str(query_engine.query(question))
