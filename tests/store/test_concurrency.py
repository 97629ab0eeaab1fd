from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from gist_rag.store import GistStore
from gist_rag.store.codec import to_bytes
from gist_rag.store.manifest import Manifest
from gist_rag.store.shards import Shards
from gist_rag.types import GistKey, PackedState, Passage

Items = list[tuple[Passage, PackedState]]


@pytest.fixture(scope="module")
def items(make_item) -> Items:
    return [make_item(number) for number in range(60)]


def read_until(done: threading.Event, store: GistStore, items: Items) -> int:
    """Read all the while; a gist is whole or not there, and stays once it is there."""
    seen: set[str] = set()
    finished = False
    while not finished:
        finished = done.is_set()
        for passage, packed in items:
            stored = store.get(GistKey("s", passage.content))
            if stored is None:
                assert passage.content not in seen
            else:
                assert to_bytes(stored) == to_bytes(packed)
                assert store.passage(passage.content) == passage
                seen.add(passage.content)
    return len(seen)


def write_and_compact(store: GistStore, items: Items) -> None:
    for begin in range(0, len(items), 5):
        store.put_many("s", items[begin : begin + 5])
    for item in items[:10]:
        store.put_many("s", [item], replace=True)
        store.compact()


@pytest.mark.parametrize("memory_bytes", [0, 10**6], ids=["disk", "memory"])
def test_threads_read_while_one_writes(tmp_path: Path, items: Items, memory_bytes: int) -> None:
    done = threading.Event()
    with (
        GistStore.open(tmp_path, memory_bytes=memory_bytes, shard_bytes=20_000) as store,
        ThreadPoolExecutor() as pool,
    ):
        store.add_space("s", {})
        readers = [pool.submit(read_until, done, store, items) for _ in range(3)]
        try:
            write_and_compact(store, items)
        finally:
            done.set()
        assert [reader.result() for reader in readers] == [len(items)] * 3
        assert store.corrupt == frozenset()


def test_a_gist_that_moves_while_it_is_read_is_found(store: GistStore, items: Items) -> None:
    passage, packed = items[0]
    key = GistKey("s", passage.content)
    store.put_many("s", [(passage, packed)])
    shard = store.path / "shards" / "000001.gist"
    blob = shard.read_bytes()
    shard.unlink()
    os.mkfifo(shard)  # opening it waits, as a slow disk would
    manifest = Manifest(store.path / "manifest.sqlite")

    with ThreadPoolExecutor() as pool:
        reading = pool.submit(store.get, key)
        time.sleep(0.1)
        (place,) = Shards(shard.parent, 10**6).append([(f"s {key.content}", blob)], {}, 2)
        manifest.move([(key, place)], [1])
        shard.open("wb").close()

        found = reading.result()
    manifest.close()

    assert found is not None
    assert to_bytes(found) == blob
    assert store.corrupt == frozenset()


def test_processes_read_while_another_writes(tmp_path: Path, items: Items, fork) -> None:
    with GistStore.open(tmp_path) as store:
        store.add_space("s", {})

    def read() -> None:
        with GistStore.open(tmp_path, read_only=True, memory_bytes=0) as reader:
            everything_there = threading.Event()
            while reader.stats().entries < len(items):
                for passage, packed in items:
                    stored = reader.get(GistKey("s", passage.content))
                    assert stored is None or to_bytes(stored) == to_bytes(packed)
            everything_there.set()
            assert read_until(everything_there, reader, items) == len(items)
            assert reader.corrupt == frozenset()

    readers = [fork(read) for _ in range(2)]
    with GistStore.open(tmp_path, shard_bytes=20_000) as store:
        write_and_compact(store, items)
    for reader in readers:
        reader.join()
    assert [reader.exitcode for reader in readers] == [0, 0]


def test_threads_may_put_at_once(store: GistStore, items: Items) -> None:
    with ThreadPoolExecutor(4) as pool:
        written = pool.map(lambda item: store.put_many("s", [item]), [*items[:20], *items[:20]])

    assert sum(written) == 20
    assert list(store.verify()) == []
    assert store.stats().dead_bytes == 0
