"""kill -9: whenever it comes, the store is as it was after some batch."""

from __future__ import annotations

import multiprocessing
import random
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from gist_rag.store import GistStore
from gist_rag.store.codec import to_bytes
from gist_rag.store.manifest import Manifest
from gist_rag.store.shards import Shards
from gist_rag.types import GistKey

SHARD_BYTES = 20_000
BATCHES = 30
BATCH_SIZE = 4


@pytest.fixture(scope="module")
def batches(make_item):
    numbers = range(BATCHES * BATCH_SIZE)
    items = [make_item(number) for number in numbers]
    return [items[i : i + BATCH_SIZE] for i in range(0, len(items), BATCH_SIZE)]


def write_all(path: Path, batches) -> None:
    with GistStore.open(path, shard_bytes=SHARD_BYTES) as store:
        store.add_space("s", {})
        for batch in batches:
            store.put_many("s", batch)


def shard_files(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (path / "shards").iterdir()}


def kill_after(fork, seconds: float, function: Callable[[], None]) -> bool:
    """Start a process, kill it some time after it began its work; whether that was in time."""
    started = multiprocessing.get_context("fork").Event()

    def work() -> None:
        started.set()
        function()

    process = fork(work)
    started.wait()
    time.sleep(seconds)
    process.kill()
    process.join()
    return bool(process.exitcode)


def assert_whole_batches(path: Path, batches) -> None:
    """Some first batches are there, whole and readable, and nothing of the others."""
    with GistStore.open(path) as store:
        found = store.contents("s")
        whole, rest = divmod(len(found), BATCH_SIZE)
        items = [item for batch in batches[:whole] for item in batch]
        assert rest == 0
        assert found == [passage.content for passage, _ in items]
        for passage, packed in items:
            stored = store.get(GistKey("s", passage.content))
            assert stored is not None
            assert to_bytes(stored) == to_bytes(packed)
        assert list(store.verify()) == []


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_killed_job_completes_to_the_same_bytes(tmp_path: Path, fork, batches, seed: int) -> None:
    begin = time.perf_counter()
    write_all(tmp_path / "calm", batches)
    calm_s = time.perf_counter() - begin
    path = tmp_path / "killed"
    delays = random.Random(seed)
    kills = 0

    # Each life is granted a little more time, so that one of them ends of itself.
    while kill_after(
        fork, calm_s * delays.uniform(0.01, 0.05) * (kills + 1), lambda: write_all(path, batches)
    ):
        kills += 1
        assert_whole_batches(path, batches)

    assert kills > 2
    assert_whole_batches(path, batches)
    assert shard_files(path) == shard_files(tmp_path / "calm")


def test_what_a_killed_writer_left_is_cut_off(tmp_path: Path, batches) -> None:
    write_all(tmp_path, batches[:5])
    before = shard_files(tmp_path)
    manifest = Manifest(tmp_path / "manifest.sqlite")
    shards = Shards(tmp_path / "shards", SHARD_BYTES)
    blobs = [("label", to_bytes(packed)) for batch in batches[5:15] for _, packed in batch]
    shards.append(blobs, manifest.shards(), manifest.next_shard())
    manifest.close()
    assert len(shard_files(tmp_path)) > len(before)

    with GistStore.open(tmp_path) as store:
        store.add_space("t", {})

    assert shard_files(tmp_path) == before


def compact(path: Path) -> None:
    with GistStore.open(path, shard_bytes=SHARD_BYTES) as store:
        store.compact()


@pytest.mark.slow
def test_compaction_may_be_killed(tmp_path: Path, fork, batches) -> None:
    whole = tmp_path / "whole"
    write_all(whole, batches)
    with GistStore.open(whole) as store:
        for batch in batches:
            store.delete(batch[0][0].content)
        kept = store.contents("s")
    shutil.copytree(whole, tmp_path / "calm")
    begin = time.perf_counter()
    compact(tmp_path / "calm")
    calm_s = time.perf_counter() - begin
    kills = 0

    for number in range(8):
        path = tmp_path / str(number)
        shutil.copytree(whole, path)
        kills += kill_after(fork, calm_s * number / 8, partial(compact, path))
        with GistStore.open(path) as store:
            assert store.contents("s") == kept
            assert list(store.verify()) == []
            store.compact()
            assert list(store.verify()) == []
            assert sum(map(len, shard_files(path).values())) == store.stats().live_bytes
    assert kills > 2
