"""The window table of the manifest: what it holds, who sees it, and how old stores come by it."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from gist_rag.matching import PassageMatcher
from gist_rag.store import GistStore
from gist_rag.store.lock import WriterLock
from gist_rag.store.windows import WindowTable
from gist_rag.types import PackedState, Passage
from gist_rag.windows import MemoryIndex

Items = Sequence[tuple[Passage, PackedState]]
TEXT = "Each passage says at some length that it is passage number {}, and nothing else."


@pytest.fixture(scope="module")
def items(make_item: Callable[[int], tuple[Passage, PackedState]]) -> Items:
    return [(Passage(TEXT.format(n), id=f"doc-{n}"), make_item(n)[1]) for n in range(20)]


def found(store: GistStore, items: Items, space: str = "s") -> list[int]:
    """Numbers of the passages that a prompt with all of them is recognised to hold."""
    numbers = {passage.content: number for number, (passage, _) in enumerate(items)}
    prompt = "\n\n".join(passage.text for passage, _ in items)
    matches = PassageMatcher(store.index(space)).find(prompt)
    return [numbers[match.content] for match in matches]


def manifest_rows(store: GistStore, query: str) -> list[tuple[int, ...]]:
    connection = sqlite3.connect(store.path / "manifest.sqlite", isolation_level=None)
    try:
        return connection.execute(query).fetchall()
    finally:
        connection.close()


def window_counts(store: GistStore) -> list[int]:
    return [n for (n,) in manifest_rows(store, "SELECT passages FROM windows ORDER BY row")]


def make_old(store: GistStore) -> None:
    """Turn a store into what gist-rag wrote before there were windows."""
    manifest_rows(store, "DROP TABLE windows")
    manifest_rows(store, "UPDATE meta SET value = 1 WHERE name = 'format'")


def format_of(store: GistStore) -> int:
    return manifest_rows(store, "SELECT value FROM meta WHERE name = 'format'")[0][0]


# ---- what it holds


def test_passages_of_another_space_are_not_found(store: GistStore, items: Items) -> None:
    store.add_space("t", {})
    store.put_many("s", items[:3])
    store.put_many("t", items[2:5])
    assert found(store, items, "s") == [0, 1, 2]
    assert found(store, items, "t") == [2, 3, 4]


def test_passages_that_begin_and_measure_alike_are_counted(store: GistStore, items: Items) -> None:
    store.put_many("s", items[:10])
    store.put_many("s", items[:3], replace=True)
    assert window_counts(store) == [10]
    store.delete(items[3][0].content)
    assert window_counts(store) == [9]
    assert found(store, items) == [0, 1, 2, 4, 5, 6, 7, 8, 9]


def test_nothing_stays_of_what_was_deleted(store: GistStore, items: Items) -> None:
    store.add_space("t", {})
    store.put_many("s", items)
    store.put_many("t", items[:1])
    for passage, _ in items:
        store.delete(passage.content)
    assert window_counts(store) == []
    assert found(store, items) == []


def test_a_gist_that_compaction_left_behind_is_not_counted(store: GistStore, items: Items) -> None:
    store.put_many("s", items[:2])
    shard = store.path / "shards" / "000001.gist"
    blob = bytearray(shard.read_bytes())
    blob[-1] ^= 1  # of the second
    shard.write_bytes(blob)
    store.put_many("s", items[2:3])
    store.delete(items[2][0].content)
    store.compact()
    assert window_counts(store) == [1]
    assert found(store, items) == [0]


# ---- who sees it


def test_puts_and_deletes_of_another_process_are_seen(store: GistStore, items: Items, fork) -> None:
    store.put_many("s", items[:2])
    store.release()
    assert found(store, items) == [0, 1]

    def write() -> None:
        with GistStore.open(store.path) as other:
            other.put_many("s", items[2:5])
            other.delete(items[0][0].content)

    writer = fork(write)
    writer.join()
    assert writer.exitcode == 0
    assert found(store, items) == [1, 2, 3, 4]


def test_a_search_waits_for_no_writer(store: GistStore, items: Items) -> None:
    store.put_many("s", items[:2])
    index = store.index("s")
    connection = sqlite3.connect(store.path / "manifest.sqlite", isolation_level=None)
    connection.execute("BEGIN IMMEDIATE")
    connection.execute("DELETE FROM entries")
    assert index.known([items[0][0].content]) == {items[0][0].content}
    assert found(store, items) == [0, 1]
    connection.close()


# ---- stores without it


def test_an_old_store_is_upgraded_at_its_first_search(store: GistStore, items: Items) -> None:
    store.put_many("s", items[:3])
    store.close()
    make_old(store)
    with GistStore.open(store.path) as old, GistStore.open(store.path) as other:
        assert found(old, items) == [0, 1, 2]
        assert format_of(old) == 2
        assert window_counts(old) == [3]
        other.put_many("s", items[3:4])  # the upgrade has let go of the lock
        assert found(old, items) == [0, 1, 2, 3]


def test_an_old_store_is_upgraded_before_it_is_written(store: GistStore, items: Items) -> None:
    store.put_many("s", items[:3])
    store.close()
    make_old(store)
    with GistStore.open(store.path) as old:
        old.put_many("s", items[:5])
        assert window_counts(old) == [5 - 3 + 3]
        assert found(old, items) == [0, 1, 2, 3, 4]


def test_an_old_store_that_may_not_be_written_is_searched(store: GistStore, items: Items) -> None:
    store.put_many("s", items[:3])
    store.close()
    make_old(store)
    with GistStore.open(store.path, read_only=True) as reader:
        assert found(reader, items) == [0, 1, 2]
        assert isinstance(reader.index("s"), MemoryIndex)
        assert reader.index("s") is reader.index("s")
        assert format_of(reader) == 1
        with GistStore.open(store.path) as writer:
            writer.delete(items[0][0].content)
        assert found(reader, items) == [1, 2]
        assert isinstance(reader.index("s"), WindowTable)


def test_an_old_store_is_searched_while_another_writes(
    store: GistStore, items: Items, tmp_path: Path
) -> None:
    store.put_many("s", items[:3])
    store.close()
    make_old(store)
    with GistStore.open(store.path) as old:
        with WriterLock(store.path / "writer.lock"):
            assert found(old, items) == [0, 1, 2]
            assert format_of(old) == 1
        assert found(old, items) == [0, 1, 2]
        assert format_of(old) == 2


def test_an_upgrade_cut_short_leaves_the_old_store(
    store: GistStore, items: Items, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put_many("s", items[:3])
    store.close()
    make_old(store)

    def fails(passages: object) -> object:
        raise KeyboardInterrupt

    with GistStore.open(store.path) as old:
        with monkeypatch.context() as patch:
            patch.setattr("gist_rag.store.manifest._window_rows", fails)
            with pytest.raises(KeyboardInterrupt):
                old.index("s")
        assert format_of(old) == 1
        assert found(old, items) == [0, 1, 2]
        assert format_of(old) == 2
