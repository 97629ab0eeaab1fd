"""Fill a gist cache from a corpus, once; later runs find it and have nothing to do.

    python examples/precompute_corpus.py                       # 12 passages of the shipped sample
    python examples/precompute_corpus.py --corpus docs.jsonl.gz --store ./gists

The library behind ``gist-rag precompute``: read, compress, index, then ask through the index.
"""

import argparse
import tempfile
from pathlib import Path

import gist_rag
from gist_rag import GistEngine, GistRAG, Sampling
from gist_rag.models import DEFAULT_RAG_MODEL
from gist_rag.retrieval import read_corpus

SAMPLE = Path(gist_rag.__file__).with_name("data") / "sqlite_passages.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, help="JSONL of passages; default: the sample")
    parser.add_argument("--store", type=Path, help="default: a folder that goes away")
    parser.add_argument("--model", default=DEFAULT_RAG_MODEL)
    parser.add_argument("--question", default="What does a checkpoint do with the WAL file?")
    options = parser.parse_args()

    passages = read_corpus(options.corpus) if options.corpus else read_corpus(SAMPLE, limit=12)
    with tempfile.TemporaryDirectory() as scratch:
        store = options.store or Path(scratch) / "gists"
        engine = GistEngine.from_pretrained(options.model, store, settings={"ratio": 8})
        with GistRAG(engine) as rag:
            show = lambda done, total, tokens: print(f"{done}/{total} passages, {tokens} tokens")
            first = rag.build(passages, progress=show)
            print(f"written {first.written}, skipped {first.skipped}, {first.seconds:.1f} s")
            again = rag.build(passages)
            print(f"again: written {again.written}, skipped {again.skipped}")

        # Another process needs the folder alone: it names model, compressor and settings.
        with GistRAG.open(store) as rag:
            answer = rag.ask(options.question, k=3, sampling=Sampling(max_tokens=32))
            print(f"{answer.stats.hits} passages read as gists: {answer.text.strip()}")
        assert again.written == 0


if __name__ == "__main__":
    main()
