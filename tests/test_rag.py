"""``GistRAG``: index and store stay together, and a store can be reopened by its folder alone."""

from __future__ import annotations

import shutil
import sqlite3
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from gist_rag.compressors import make_compressor
from gist_rag.engine import GistEngine
from gist_rag.errors import (
    BadInput,
    CorruptEntry,
    IndexMismatch,
    MissingExtra,
    SpaceMismatch,
    UnknownCompressor,
)
from gist_rag.rag import GistRAG, check_index, index_folder
from gist_rag.reader import load_backbone
from gist_rag.retrieval import VectorIndex, Vectors
from gist_rag.store import GistStore
from gist_rag.types import Passage, Sampling, content_key

SHORT = Sampling(max_tokens=4)
MakeEngine = Callable[..., GistEngine]


class WordEmbedder:
    """Counts words in hashed buckets: quick, and good enough to find a passage by its own words."""

    def __init__(self, name: str = "words") -> None:
        self.name = name
        self.embedded = 0

    def __call__(self, texts: Sequence[str]) -> Vectors:
        self.embedded += len(texts)
        vectors = np.zeros((len(texts), 256), dtype=np.float32)
        for row, text in enumerate(texts):
            for word in text.lower().split():
                vectors[row, int(content_key(word), 16) % 256] += 1
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.fixture
def rag(make_engine: MakeEngine, passages: list[Passage]) -> GistRAG:
    """Eight passages, compressed and indexed."""
    rag = GistRAG(make_engine(settings={"ratio": 4}), embedder=WordEmbedder())
    rag.build(passages[:8])
    return rag


@pytest.fixture
def folder(tiny_model_folder: Path, tmp_path: Path, passages: list[Passage]) -> Path:
    """A store that a process made and closed, with settings that are no defaults."""
    engine = GistEngine.from_pretrained(
        str(tiny_model_folder),
        tmp_path / "made",
        settings={"ratio": 4, "preset": "fast"},
        codec="int8",
    )
    with GistRAG(engine, embedder=WordEmbedder()) as rag:
        rag.build(passages[:4])
    return tmp_path / "made"


def reopened(folder: Path) -> GistRAG:
    return GistRAG.open(folder, embedder=WordEmbedder())


# ---- asking


def test_a_question_is_answered_from_gists_of_the_passages_it_is_about(
    rag: GistRAG, passages: list[Passage]
) -> None:
    question = passages[5].text[:120]
    assert rag.retrieve(question, 3)[0] == passages[5]
    answer = rag.ask(question, 3, SHORT)
    assert [p.content for p in answer.passages] == [p.content for p in rag.retrieve(question, 3)]
    assert (answer.stats.hits, answer.stats.misses) == (3, 0)


def test_scores_fall_and_lie_beside_their_passages(rag: GistRAG) -> None:
    found = rag.search("What does a checkpoint do to the WAL file?", 8)
    scores = [f.score for f in found]
    assert scores == sorted(scores, reverse=True)
    assert len({f.passage.content for f in found}) == 8


def test_full_text_reads_the_same_passages_as_text(rag: GistRAG) -> None:
    answer = rag.ask("What is a WAL file?", 3, SHORT, full_text=True)
    assert answer.stats.hits == 0
    assert answer.stats.text_tokens > 300


def test_stream_gives_the_answer_of_ask_in_pieces(rag: GistRAG) -> None:
    *pieces, last = rag.stream("What is a WAL file?", 2, SHORT)
    assert last.answer is not None
    assert "".join(p.text for p in pieces) + last.text == last.answer.text
    assert last.answer.text == rag.ask("What is a WAL file?", 2, SHORT).text


def test_given_passages_are_read_instead_of_retrieved_ones(
    rag: GistRAG, passages: list[Passage]
) -> None:
    answer = rag.ask("What is a WAL file?", sampling=SHORT, passages=passages[6:8])
    assert answer.passages == passages[6:8]


def test_passages_too_short_to_be_recognised_are_read_as_gists(
    make_engine: MakeEngine, passages: list[Passage]
) -> None:
    short = Passage("A commit appends a record.", id="short")
    rag = GistRAG(make_engine(settings={"ratio": 4}), embedder=WordEmbedder())
    rag.build([short, *passages[:2]])
    answer = rag.ask(short.text, 3, SHORT)
    assert answer.stats.hits == 3
    assert short in answer.passages
    as_text = rag.ask(short.text, 3, SHORT, full_text=True)
    assert answer.stats.text_tokens + answer.stats.cached_tokens < as_text.stats.input_tokens / 2


@pytest.mark.parametrize(("question", "k"), [("  ", 5), ("What?", 0)])
def test_empty_questions_and_k_below_one_are_refused(rag: GistRAG, question: str, k: int) -> None:
    with pytest.raises(BadInput):
        rag.retrieve(question, k)


# ---- index and store agree


def test_build_again_writes_nothing_and_embeds_nothing(
    rag: GistRAG, passages: list[Passage]
) -> None:
    again = GistRAG(rag.engine, embedder=(embedder := WordEmbedder()))
    done = again.build(passages[:8])
    assert (done.written, done.skipped, len(again.index), embedder.embedded) == (0, 8, 8, 0)


def test_build_and_delete_let_others_write(rag: GistRAG, passages: list[Passage]) -> None:
    with GistStore.open(rag.engine.store.path) as other:
        other.acquire()
        other.release()
        rag.delete(passages[0].content)
        other.acquire()


def test_build_gives_vectors_to_passages_that_were_indexed_before_there_were_any(
    rag: GistRAG, passages: list[Passage]
) -> None:
    store, contents = rag.engine.store, [p.content for p in passages[:8]]
    with sqlite3.connect(store.path / "manifest.sqlite") as connection:
        connection.execute("DELETE FROM vectors")
    connection.close()
    rag.build(passages[:8])
    assert store.vectors(rag.embedder.name, contents).keys() == {*contents}


def test_deleting_removes_gist_and_row_for_good(rag: GistRAG, passages: list[Passage]) -> None:
    victim = passages[2]
    assert rag.delete(victim.content)
    assert not rag.delete(victim.content)
    assert victim not in rag.retrieve(victim.text[:120], 8)
    loaded = VectorIndex.load(index_folder(rag.engine.store, rag.engine.space))
    assert victim.content not in loaded.contents
    check_index(loaded, rag.engine.store, rag.engine.space)


def test_a_passage_deleted_behind_the_index_is_not_passed_over(
    rag: GistRAG, passages: list[Passage]
) -> None:
    rag.engine.store.delete(passages[0].content)
    with pytest.raises(IndexMismatch, match="deleted"):
        rag.retrieve(passages[0].text[:120], 8)


def test_an_index_that_was_never_built_is_not_taken_for_an_empty_store(
    make_engine: MakeEngine, passages: list[Passage]
) -> None:
    engine = make_engine(settings={"ratio": 4})
    engine.precompute(passages[:2])
    with pytest.raises(IndexMismatch, match="2 of 2 gists"):
        GistRAG(engine, embedder=WordEmbedder()).retrieve("What?")


def test_open_counts_what_is_on_one_side_only_and_build_repairs_it(
    folder: Path, passages: list[Passage]
) -> None:
    with reopened(folder) as rag:
        rag.engine.store.delete(passages[0].content)
        rag.engine.precompute(passages[4:6])
    with pytest.raises(IndexMismatch, match=r"1 of 4 index rows .* 2 of 5 gists") as refused:
        reopened(folder)
    assert "gist-rag precompute again" in str(refused.value)
    engine = GistEngine.from_pretrained(
        rag.engine.backbone.name,
        folder,
        settings={"ratio": 4, "preset": "fast"},
        codec="int8",
    )
    with GistRAG(engine, embedder=WordEmbedder()) as repaired:
        repaired.build(passages[4:6])
    with reopened(folder) as rag:
        assert set(rag.index.contents) == {p.content for p in passages[1:6]}


def test_a_damaged_index_is_refused_and_build_makes_a_new_one(
    rag: GistRAG, passages: list[Passage]
) -> None:
    [vectors] = rag.engine.store.path.glob("index/*/*.faiss")
    vectors.write_bytes(vectors.read_bytes()[:-1])
    with pytest.raises(CorruptEntry):
        VectorIndex.load(vectors.parent)
    again = GistRAG(rag.engine, embedder=WordEmbedder())
    again.build(passages[:8])
    assert len(VectorIndex.load(vectors.parent)) == 8


def test_an_index_of_another_embedder_is_never_searched(rag: GistRAG) -> None:
    with pytest.raises(IndexMismatch, match="'words', not 'others'"):
        GistRAG(rag.engine, rag.index, WordEmbedder("others"))
    assert len(GistRAG(rag.engine, embedder=WordEmbedder("others")).index) == 0


# ---- reopening


def test_a_folder_alone_brings_back_every_setting(folder: Path, passages: list[Passage]) -> None:
    with reopened(folder) as rag:
        described = rag.engine.describe()
        assert (described["settings"]["ratio"], described["settings"]["preset"]) == (4.0, "fast")
        assert described["codec"] == "int8"
        assert rag.ask(passages[1].text[:120], 2, SHORT).stats.hits == 2


def test_a_trained_compressor_is_found_by_the_store(
    tiny_model_folder: Path, passages: list[Passage], tmp_path: Path
) -> None:
    """Its folder is part of what a store knows, but not of what its gists are."""
    backbone, _ = load_backbone(str(tiny_model_folder))
    for name in ("here", "there"):
        torch.manual_seed(0)
        make_compressor("gisting", backbone, {"ratio": 4}).save_pretrained(tmp_path / name)
    store = tmp_path / "store"
    with GistEngine.from_pretrained(
        str(tiny_model_folder), store, compressor=tmp_path / "here"
    ) as engine:
        GistRAG(engine, embedder=WordEmbedder()).build(passages[:4])
    with GistRAG.open(store, embedder=WordEmbedder()) as rag:
        assert rag.engine.describe()["folder"] == str(tmp_path / "here")
        assert rag.ask(passages[1].text[:120], 2, SHORT).stats.hits == 2
    shutil.rmtree(tmp_path / "here")
    with pytest.raises(UnknownCompressor, match="here"):
        GistRAG.open(store, embedder=WordEmbedder())
    with GistRAG.open(store, compressor=tmp_path / "there", embedder=WordEmbedder()) as rag:
        assert rag.ask(passages[1].text[:120], 2, SHORT).stats.hits == 2


def test_a_store_is_never_made_by_opening_it(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no store"):
        GistRAG.open(tmp_path / "absent")
    assert not (tmp_path / "absent").exists()
    GistStore.open(tmp_path / "empty").close()
    with pytest.raises(BadInput, match="no gists"):
        GistRAG.open(tmp_path / "empty")


def test_changed_weights_under_the_old_name_are_noticed(
    folder: Path, tiny_model_folder: Path, tmp_path: Path
) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(tiny_model_folder, changed)
    model = AutoModelForCausalLM.from_pretrained(changed)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(1.1)
    model.save_pretrained(changed)
    with pytest.raises(SpaceMismatch, match="not the same"):
        GistRAG.open(folder, model=str(changed), embedder=WordEmbedder())


def test_a_model_that_moved_is_found_where_it_is_said_to_be(
    folder: Path, tiny_model_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_model_folder, tmp_path / "moved")
    with GistRAG.open(folder, model=str(tmp_path / "moved"), embedder=WordEmbedder()) as rag:
        assert rag.ask("What is a WAL file?", 2, SHORT).stats.hits == 2


def test_the_newest_of_several_spaces_is_opened_and_each_has_its_own_index(
    folder: Path, tiny_model_folder: Path, passages: list[Passage]
) -> None:
    engine = GistEngine.from_pretrained(str(tiny_model_folder), folder, settings={"ratio": 2})
    with GistRAG(engine, embedder=WordEmbedder()) as rag:
        rag.build(passages[:2])
    with reopened(folder) as rag:
        assert rag.engine.compressor.config.ratio == 2
        assert len(rag.index) == 2


def test_one_of_several_namespaces_must_be_named(
    folder: Path, tiny_model_folder: Path, passages: list[Passage]
) -> None:
    engine = GistEngine.from_pretrained(str(tiny_model_folder), folder, namespace="../acme")
    with GistRAG(engine, embedder=WordEmbedder()) as rag:
        rag.build(passages[:1])
    with pytest.raises(BadInput, match=r"several namespaces \('', '../acme'\)"):
        reopened(folder)
    with GistRAG.open(folder, namespace="../acme", embedder=WordEmbedder()) as rag:
        assert rag.retrieve("anything") == passages[:1]
    with pytest.raises(BadInput, match="namespace 'nobody'"):
        GistRAG.open(folder, namespace="nobody")


def test_without_faiss_nothing_is_compressed_in_vain(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    engine = make_engine()
    with pytest.raises(MissingExtra, match=r"gist-rag\[faiss\]"):
        GistRAG(engine, embedder=WordEmbedder())
