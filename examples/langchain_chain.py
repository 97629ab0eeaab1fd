"""RAG with LangChain, unmodified: the model reads retrieved passages as gists instead of text.

Prints what two usual chains answer, and when the first token came from text and from gists.
"""

import argparse
from importlib.resources import files

from langchain_classic.chains import create_retrieval_chain
from langchain_classic.chains.combine_documents import create_stuff_documents_chain
from langchain_community.vectorstores import FAISS
from langchain_core.documents import Document
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnablePassthrough
from langchain_huggingface import HuggingFaceEmbeddings

from gist_rag.models import DEFAULT_EMBEDDER, DEFAULT_RAG_MODEL, embedder_folder
from gist_rag.retrieval import read_corpus
from langchain_gist_rag import ChatGist

QUESTIONS = (
    "What is the default maximum length in bytes of a LIKE or GLOB pattern in SQLite?",
    "About how many pages does the WAL file reach before a checkpoint runs automatically?",
)
SYSTEM = "Answer the question from the documents, in a few words."
PROMPT = ChatPromptTemplate(
    [("system", SYSTEM), ("human", "Documents:\n\n{context}\n\nQuestion: {input}")]
)


def main(model: str, limit: int) -> None:
    sample = str(files("gist_rag") / "data" / "sqlite_passages.jsonl")
    documents = [Document(p.text, id=p.id) for p in read_corpus(sample, limit=limit)]
    vectors = FAISS.from_documents(documents, HuggingFaceEmbeddings(model_name=embedder_folder()))
    retriever = vectors.as_retriever(search_kwargs={"k": 3})

    llm = ChatGist(model=model, ratio=4, judge=DEFAULT_EMBEDDER, max_tokens=32)
    print(llm.precompress(documents, show_progress=True))

    context = retriever | (lambda found: "\n\n".join(d.page_content for d in found))
    prompt = {"context": context, "input": RunnablePassthrough()} | PROMPT
    for question in QUESTIONS:
        print(f"\n{question}")
        for reader in (llm.bind(gist_mode="off"), llm):
            answer = (prompt | reader).invoke(question)
            gist = answer.response_metadata["gist"]
            print(f"{gist['hits']} passages as gists, first token {gist['first_token_ms']:.0f} ms:")
            print(" ", answer.text)

    classic = create_retrieval_chain(retriever, create_stuff_documents_chain(llm, PROMPT))
    print("\ncreate_retrieval_chain:", classic.invoke({"input": QUESTIONS[0]})["answer"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model", default=DEFAULT_RAG_MODEL, help="alias, folder or Hugging Face id"
    )
    parser.add_argument("--limit", type=int, default=8, help="passages of the sample to compress")
    main(**vars(parser.parse_args()))
