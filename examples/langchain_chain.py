"""RAG with LangChain, unmodified: the model reads retrieved passages as gists instead of text.

    python examples/langchain_chain.py --limit 12

Prints what two usual chains answer, and when the first token came from gists and from text.
"""

from __future__ import annotations

import argparse
from importlib.resources import files

from langchain_classic.chains import create_retrieval_chain
from langchain_classic.chains.combine_documents import create_stuff_documents_chain
from langchain_community.vectorstores import FAISS
from langchain_core.documents import Document
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnablePassthrough
from langchain_huggingface import HuggingFaceEmbeddings

from gist_rag.models import DEFAULT_MODEL, embedder_folder
from gist_rag.retrieval import read_corpus
from langchain_gist_rag import ChatGist

QUESTIONS = (
    "How many columns does a 3-dimensional R*Tree virtual table have?",
    "What is the default maximum length of a LIKE or GLOB pattern?",
)
PROMPT = ChatPromptTemplate.from_messages(
    [
        ("system", "Answer the question from the documents, in a few words."),
        ("human", "Documents:\n\n{context}\n\nQuestion: {input}"),
    ]
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=DEFAULT_MODEL, help="alias, folder or Hugging Face id")
    parser.add_argument("--limit", type=int, default=12, help="passages of the sample to compress")
    options = parser.parse_args()

    corpus = read_corpus(
        str(files("gist_rag") / "data" / "sqlite_passages.jsonl"), limit=options.limit
    )
    documents = [Document(p.text, metadata={"source": p.id}) for p in corpus]
    vectors = FAISS.from_documents(documents, HuggingFaceEmbeddings(model_name=embedder_folder()))
    retriever = vectors.as_retriever(search_kwargs={"k": 3})

    llm = ChatGist(model=options.model, ratio=8, max_tokens=24)
    print(llm.precompress(documents, show_progress=True))

    context = retriever | (lambda found: "\n\n".join(d.page_content for d in found))
    prompt = {"context": context, "input": RunnablePassthrough()} | PROMPT
    for question in QUESTIONS:
        gists = (prompt | llm).invoke(question)
        text = (prompt | llm.bind(gist_mode="off")).invoke(question)
        read, plain = gists.response_metadata["gist"], text.response_metadata["gist"]
        print(
            f"\n{question}\n  from text : {text.text!r}, first token {plain['first_token_ms']:.0f} ms"
        )
        print(f"  from gists: {gists.text!r}, first token {read['first_token_ms']:.0f} ms")
        print(
            f"  {read['hits']} passages, {read['source_tokens']} tokens in {read['gist_tokens']} slots"
        )

    classic = create_retrieval_chain(retriever, create_stuff_documents_chain(llm, PROMPT))
    print("\ncreate_retrieval_chain:", repr(classic.invoke({"input": QUESTIONS[0]})["answer"]))


if __name__ == "__main__":
    main()
