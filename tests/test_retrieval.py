"""Corpus files, chunks, and the FAISS index whose rows are content keys."""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gist_rag.errors import (
    BadInput,
    CorruptEntry,
    FormatTooNew,
    IndexMismatch,
    MissingExtra,
    StoreWriteError,
)
from gist_rag.models import embedder_folder
from gist_rag.retrieval import SentenceEmbedder, VectorIndex, Vectors, read_corpus, split
from gist_rag.retrieval.index import faiss_id
from gist_rag.types import Passage, content_key

CONTENTS = [content_key(f"passage {i}") for i in range(40)]


def vectors(count: int = 40, dimension: int = 8) -> Vectors:
    """Unit rows that are all different."""
    raw = np.random.default_rng(0).normal(size=(count, dimension)).astype(np.float32)
    return raw / np.linalg.norm(raw, axis=1, keepdims=True)


@pytest.fixture
def index() -> VectorIndex:
    index = VectorIndex("some-embedder")
    index.add(CONTENTS, vectors())
    return index


def write_corpus(path: Path, records: Sequence[object]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


# ---- index


def test_search_finds_what_brute_force_finds(index: VectorIndex) -> None:
    questions = vectors()[:3] + 0.1
    hits = index.search(questions, 5)
    scores = questions @ vectors().T
    for row, found in zip(scores, hits, strict=True):
        best = np.argsort(-row)[:5]
        assert [hit.content for hit in found] == [CONTENTS[i] for i in best]
        assert np.allclose([hit.score for hit in found], row[best], atol=1e-5)


def test_row_ids_come_from_content_keys() -> None:
    assert faiss_id("f" * 64) == 2**63 - 1
    assert faiss_id("0" * 63 + "1") == 0


def test_contents_that_are_there_are_not_added_again(index: VectorIndex) -> None:
    assert index.add([CONTENTS[0], CONTENTS[0]], vectors(2)) == 0
    assert len(index) == 40


def test_colliding_ids_are_refused_and_nothing_is_added(index: VectorIndex) -> None:
    twin = CONTENTS[0][:20] + "0" * 44
    with pytest.raises(BadInput, match="same FAISS id"):
        index.add([content_key("new"), twin], vectors(2))
    assert index.contents == CONTENTS


@pytest.mark.parametrize("factory", ["IDMap2,Flat", "IVF4,Flat"])
def test_removed_passages_are_not_found_and_the_others_keep_their_ids(factory: str) -> None:
    index = VectorIndex(factory=factory)
    index.add(CONTENTS, vectors())
    assert index.remove([*CONTENTS[:7], content_key("stranger")]) == 7
    assert index.contents == CONTENTS[7:]
    for number in (7, 20, 39):
        assert index.search(vectors()[number : number + 1], 1)[0][0].content == CONTENTS[number]
    assert not {h.content for h in index.search(vectors()[:1], 40)[0]} & set(CONTENTS[:7])


def test_hnsw_searches_but_says_that_it_cannot_forget() -> None:
    index = VectorIndex(factory="IDMap2,HNSW8")
    index.add(CONTENTS, vectors())
    assert index.search(vectors()[3:4], 1)[0][0].content == CONTENTS[3]
    with pytest.raises(BadInput, match="cannot remove"):
        index.remove(CONTENTS[:1])


@pytest.mark.parametrize(
    ("factory", "words"),
    [("IDMap2,IVF4,Flat", "leave IDMap out"), ("Flat", "keeps ids"), ("nonsense", "nonsense")],
)
def test_factories_that_lose_ids_are_refused(factory: str, words: str) -> None:
    with pytest.raises(BadInput, match=words):
        VectorIndex(factory=factory).add(CONTENTS, vectors())


def test_an_index_without_rows_finds_nothing(index: VectorIndex) -> None:
    index.remove(CONTENTS)
    assert index.search(vectors(2), 5) == [[], []]


def test_k_beyond_the_index_gives_all_of_it(index: VectorIndex) -> None:
    assert len(index.search(vectors(1), 1000)[0]) == 40


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (vectors(2, 5), r"must be \(n, 8\)"),
        (np.zeros(8, np.float32), r"must be \(n, 8\)"),
        (np.full((2, 8), np.nan, np.float32), "NaN"),
        (vectors(3), "2 contents with 3 vectors"),
    ],
    ids=["dimension", "one-dimensional", "nan", "count"],
)
def test_vectors_that_do_not_fit_are_refused(index: VectorIndex, given: Any, words: str) -> None:
    with pytest.raises(BadInput, match=words):
        index.add([content_key("a"), content_key("b")], given)


def test_k_below_one_and_foreign_keys_are_refused(index: VectorIndex) -> None:
    with pytest.raises(BadInput, match="k is 0"):
        index.search(vectors(1), 0)
    with pytest.raises(BadInput, match="no content key"):
        index.remove(["not-hex"])


def test_missing_faiss_says_which_extra_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(MissingExtra, match=r"gist-rag\[faiss\]"):
        VectorIndex()


# ---- index on the disk


@pytest.mark.parametrize("factory", ["IDMap2,Flat", "IVF4,Flat"])
def test_a_loaded_index_answers_as_the_saved_one(tmp_path: Path, factory: str) -> None:
    index = VectorIndex("some-embedder", factory)
    index.add(CONTENTS, vectors())
    index.save(tmp_path / "index")
    loaded = VectorIndex.load(tmp_path / "index")
    assert (loaded.embedder, loaded.factory, loaded.dimension) == ("some-embedder", factory, 8)
    assert loaded.contents == CONTENTS
    assert loaded.search(vectors(3), 4) == index.search(vectors(3), 4)
    loaded.add([content_key("later")], vectors(1))
    assert loaded.remove(CONTENTS[:1]) == 1


def test_saving_again_leaves_no_old_files(index: VectorIndex, tmp_path: Path) -> None:
    index.save(tmp_path)
    index.remove(CONTENTS[:1])
    index.save(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    assert VectorIndex.load(tmp_path).contents == CONTENTS[1:]


def test_a_save_that_was_cut_short_leaves_the_old_index(
    index: VectorIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index.save(tmp_path)
    index.remove(CONTENTS[:1])
    replace = Path.replace

    def replace_all_but_sidecar(source: Path, target: Path) -> None:
        if target.name == "index.json":
            raise OSError("no space left")
        replace(source, target)

    monkeypatch.setattr(Path, "replace", replace_all_but_sidecar)
    with pytest.raises(StoreWriteError, match="no space left"):
        index.save(tmp_path)
    assert VectorIndex.load(tmp_path).contents == CONTENTS


def test_every_flipped_byte_of_the_vectors_is_noticed(index: VectorIndex, tmp_path: Path) -> None:
    index.save(tmp_path)
    [file] = tmp_path.glob("*.faiss")
    whole = file.read_bytes()
    for at in range(0, len(whole), 97):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(CorruptEntry, match="checksum"):
            VectorIndex.load(tmp_path)


def test_a_changed_content_key_is_noticed(index: VectorIndex, tmp_path: Path) -> None:
    index.save(tmp_path)
    sidecar = tmp_path / "index.json"
    sidecar.write_text(sidecar.read_text().replace(CONTENTS[5], CONTENTS[5][:-1] + "x"))
    with pytest.raises(CorruptEntry, match="checksum"):
        VectorIndex.load(tmp_path)


@pytest.mark.parametrize(
    "sidecar",
    ["", "[]", "{}", '{"format": "one"}', '{"format": 1, "checksum": 5}', '{"format": 1, "chec'],
)
def test_foreign_and_broken_sidecars_are_corrupt(
    index: VectorIndex, tmp_path: Path, sidecar: str
) -> None:
    index.save(tmp_path)
    (tmp_path / "index.json").write_text(sidecar)
    with pytest.raises(CorruptEntry, match="precompute again"):
        VectorIndex.load(tmp_path)


def test_missing_vectors_are_corrupt_and_a_missing_index_is_a_mismatch(
    index: VectorIndex, tmp_path: Path
) -> None:
    with pytest.raises(IndexMismatch, match="no index in"):
        VectorIndex.load(tmp_path)
    index.save(tmp_path)
    next(tmp_path.glob("*.faiss")).unlink()
    with pytest.raises(CorruptEntry, match="gone"):
        VectorIndex.load(tmp_path)


def test_a_newer_format_is_refused_by_name(index: VectorIndex, tmp_path: Path) -> None:
    index.save(tmp_path)
    sidecar = tmp_path / "index.json"
    sidecar.write_text(json.dumps(json.loads(sidecar.read_text()) | {"format": 2}))
    with pytest.raises(FormatTooNew, match="format 2"):
        VectorIndex.load(tmp_path)


def test_an_index_cannot_be_saved_into_a_file_or_without_vectors(
    index: VectorIndex, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreWriteError):
        index.save(tmp_path / "file")
    with pytest.raises(BadInput, match="without vectors"):
        VectorIndex().save(tmp_path)


# ---- corpus


def test_titles_stand_before_texts_that_do_not_begin_with_them(tmp_path: Path) -> None:
    path = write_corpus(
        tmp_path / "c.jsonl",
        [
            {"id": "a", "title": "Kestrels", "text": "They hover."},
            {"id": "b", "title": "Kestrels", "text": "Kestrels hover."},
            {"text": "No title, no id.", "url": "somewhere"},
        ],
    )
    assert [p.text for p in read_corpus(path)] == [
        "Kestrels\nThey hover.",
        "Kestrels hover.",
        "No title, no id.",
    ]
    assert read_corpus(path, with_title=False)[0].text == "They hover."
    assert [p.id for p in read_corpus(path)] == ["a", "b", "3"]
    assert read_corpus(path)[2].metadata == {"url": "somewhere"}
    assert len(read_corpus(path, limit=2)) == 2


def test_gzip_and_plain_give_the_same_passages(tmp_path: Path) -> None:
    plain = write_corpus(tmp_path / "c.jsonl", [{"id": "ä", "text": "Grüße, 世界"}])
    packed = tmp_path / "c.jsonl.gz"
    packed.write_bytes(gzip.compress(b"\xef\xbb\xbf" + plain.read_bytes() + b"\n\n"))
    assert read_corpus(packed) == read_corpus(plain)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "holds no passages"),
        (b"\n \n", "holds no passages"),
        (b'{"text": "fine"}\n{"text": ', "line 2 is not JSON"),
        (b'{"text": "fine"}\n["text"]', "line 2: a JSON object"),
        (b'{"title": "no text"}', "line 1: a record needs"),
        (b'{"text": "   "}', "line 1: a record needs"),
        (b'{"text": 5}', "line 1: a record needs"),
        (b'{"text": "t", "title": 5}', "line 1: a record needs"),
        (b'{"id": 1, "text": "a"}\n{"id": "1", "text": "b"}', "line 2: a record with the id '1'"),
        (b'{"text": "\\ud800"}', "surrogate"),
        (b'{"text": "\xff"}', "cannot read"),
    ],
    ids=lambda value: value[:18] if isinstance(value, str) else "",
)
def test_records_that_cannot_be_used_name_their_line(
    tmp_path: Path, content: bytes, words: str
) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(content)
    with pytest.raises(BadInput, match=words):
        read_corpus(path)


def test_unreadable_files_and_limits_below_one_are_refused(tmp_path: Path) -> None:
    broken = tmp_path / "c.jsonl.gz"
    broken.write_bytes(gzip.compress(b'{"text": "a"}\n' * 500)[:-20])
    for path in (tmp_path / "absent.jsonl", tmp_path, broken):
        with pytest.raises(BadInput):
            read_corpus(path)
    with pytest.raises(BadInput, match="limit is 0"):
        read_corpus(broken, limit=0)


# ---- splitting


def test_split_cuts_at_sentence_ends_and_keeps_every_word() -> None:
    sentences = [f"Sentence number {i} has six words." for i in range(10)]
    passage = Passage(" ".join(sentences), "long", {"title": "t"})
    pieces = split(passage, max_words=20)
    assert " ".join(p.text for p in pieces) == passage.text
    assert all(p.text.endswith(".") and len(p.text.split()) <= 20 for p in pieces)
    assert [p.id for p in pieces] == ["long#1", "long#2", "long#3", "long#4"]
    assert pieces[0].metadata == {"title": "t"}


def test_split_repeats_whole_sentences_as_overlap() -> None:
    passage = Passage(" ".join(f"This is sentence {i}." for i in range(9)), "p")
    pieces = split(passage, max_words=12, overlap=5)
    for before, after in pairwise(pieces):
        assert after.text.startswith(before.text.rpartition(". ")[2])
    assert all(len(p.text.split()) <= 12 for p in pieces)


def test_split_cuts_a_sentence_without_end_between_words() -> None:
    pieces = split(Passage("word " * 95, "p"), max_words=30, overlap=10)
    assert [len(p.text.split()) for p in pieces] == [30, 30, 30, 5]


def test_split_leaves_short_passages_and_refuses_nonsense() -> None:
    passage = Passage("Short.", "p")
    assert split(passage) == [passage]
    with pytest.raises(BadInput, match="overlap"):
        split(passage, max_words=10, overlap=10)


# ---- embedding


@pytest.mark.model
@pytest.mark.slow
def test_the_packaged_embedder_finds_the_passage_a_question_is_about(
    passages: list[Passage],
) -> None:
    embedder = SentenceEmbedder(embedder_folder(), "minilm")
    index = VectorIndex(embedder.name)
    index.add([p.content for p in passages], embedder([p.text for p in passages]))
    question = embedder(["How large can an SQLite database get?"])
    assert np.allclose(np.linalg.norm(question, axis=1), 1, atol=1e-5)
    by_content = {p.content: p.id for p in passages}
    ids = [by_content[hit.content] for hit in index.search(question, 3)[0]]
    assert any(i.startswith("sqlite-limits") for i in ids)
