from __future__ import annotations

import contextlib
import datetime
import itertools
import logging
import random
import resource
import sqlite3
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from gist_rag.errors import (
    BadInput,
    CorruptEntry,
    FormatTooNew,
    GistRagError,
    StoreLocked,
    StoreWriteError,
)
from gist_rag.store import GistStore, pack
from gist_rag.store.codec import to_bytes
from gist_rag.types import GistKey, PackedState, Passage, content_key


def key_of(passage: Passage, space: str = "s") -> GistKey:
    return GistKey(space, passage.content)


def equal(one: PackedState | None, other: PackedState) -> bool:
    return one is not None and to_bytes(one) == to_bytes(other)


def files_with(folder: Path, needle: bytes, copy: Path) -> list[str]:
    """Files of a store that hold some bytes.

    They are searched in a copy: closing a file that SQLite has open would drop SQLite's locks.
    """
    subprocess.run(["cp", "-r", folder, copy], check=True)
    files = (path for path in copy.rglob("*") if path.is_file())
    return sorted(path.name for path in files if needle in path.read_bytes())


class TestOpening:
    def test_a_store_is_found_again(self, tmp_path: Path, make_item) -> None:
        passage, packed = make_item(1)
        with GistStore.open(tmp_path / "deep" / "store") as store:
            store.add_space("s", {"model": "m"})
            store.put_many("s", [(passage, packed)])

        with GistStore.open(tmp_path / "deep" / "store", create=False) as store:
            assert store.spaces() == {"s": {"model": "m"}}
            assert equal(store.get(key_of(passage)), packed)

    def test_a_closed_store_is_three_names(self, tmp_path: Path, make_item) -> None:
        with GistStore.open(tmp_path) as store:
            store.add_space("s", {})
            store.put_many("s", [make_item(1)])

        assert {path.name for path in tmp_path.iterdir()} == {
            "manifest.sqlite",
            "shards",
            "writer.lock",
        }

    @pytest.mark.parametrize("options", [{"create": False}, {"read_only": True}], ids=str)
    def test_no_store_is_made_where_none_is_wanted(
        self, tmp_path: Path, options: dict[str, bool]
    ) -> None:
        with pytest.raises(BadInput, match="make one with gist-rag precompute"):
            GistStore.open(tmp_path / "none", **options)

        assert list(tmp_path.iterdir()) == []

    def test_a_folder_of_other_things_is_refused_and_left_alone(self, tmp_path: Path) -> None:
        (tmp_path / "thesis.tex").write_text("...")

        with pytest.raises(StoreWriteError, match=r"not a store folder: it holds 'thesis\.tex'"):
            GistStore.open(tmp_path)

        assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]

    @pytest.mark.parametrize("name", ["file", "file/store", "/proc/gist-store"])
    def test_a_place_that_cannot_be_a_folder_is_refused(self, tmp_path: Path, name: str) -> None:
        (tmp_path / "file").write_text("...")

        with pytest.raises(StoreWriteError, match=r"file|/proc"):
            GistStore.open(tmp_path / name)

    def test_a_store_whose_making_was_cut_short_is_completed(self, tmp_path: Path) -> None:
        (tmp_path / "manifest.sqlite").touch()
        (tmp_path / "writer.lock").touch()

        with GistStore.open(tmp_path) as store:
            assert store.stats().entries == 0

    def test_several_processes_may_make_the_same_store(self, tmp_path: Path, fork) -> None:
        processes = [fork(lambda: GistStore.open(tmp_path / "store").close()) for _ in range(6)]

        for process in processes:
            process.join()
        assert [process.exitcode for process in processes] == [0] * 6

    def test_a_newer_format_is_refused_by_name(self, store: GistStore) -> None:
        store.close()
        connection = sqlite3.connect(store.path / "manifest.sqlite")
        connection.execute("UPDATE meta SET value = 3 WHERE name = 'format'")
        connection.commit()
        connection.close()

        with pytest.raises(FormatTooNew, match="has format 3"):
            GistStore.open(store.path)

    def test_a_damaged_manifest_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "manifest.sqlite").write_bytes(b"not a database at all" * 99)

        with pytest.raises(CorruptEntry, match=r"manifest\.sqlite is damaged"):
            GistStore.open(tmp_path)

    def test_a_folder_without_permission_is_refused(
        self, open_folder: Path, as_nobody: Callable[[Callable[[], None]], None]
    ) -> None:
        open_folder.chmod(0o555)

        def attempt() -> None:
            for path in (open_folder, open_folder / "store"):
                with pytest.raises(StoreWriteError, match="Permission denied"):
                    GistStore.open(path)

        as_nobody(attempt)

    def test_a_folder_that_cannot_be_written_to_can_be_read(
        self, open_folder: Path, make_item, as_nobody: Callable[[Callable[[], None]], None]
    ) -> None:
        passage, packed = make_item(1)
        with GistStore.open(open_folder) as store:
            store.add_space("s", {})
            store.put_many("s", [(passage, packed)])
        open_folder.chmod(0o555)

        def attempt() -> None:
            with pytest.raises(StoreWriteError, match="open it with read_only=True"):
                GistStore.open(open_folder)
            with GistStore.open(open_folder, read_only=True) as store:
                assert equal(store.get(key_of(passage)), packed)

        as_nobody(attempt)

    def test_a_reader_without_permission_follows_a_writer(
        self, open_folder: Path, make_item, as_nobody: Callable[[Callable[[], None]], None]
    ) -> None:
        passage, packed = make_item(1)
        with GistStore.open(open_folder) as store:
            store.add_space("s", {})
            store.put_many("s", [(passage, packed)])

            def attempt() -> None:
                with GistStore.open(open_folder, read_only=True) as reader:
                    assert equal(reader.get(key_of(passage)), packed)

            as_nobody(attempt)

    def test_read_only_means_it(self, store: GistStore, make_item) -> None:
        with GistStore.open(store.path, read_only=True) as reader:
            for write in (
                lambda: reader.put_many("s", [make_item(1)]),
                lambda: reader.add_space("t", {}),
                lambda: reader.delete("x"),
                lambda: reader.compact(),
            ):
                with pytest.raises(StoreWriteError, match="read_only=True"):
                    write()

    def test_a_closed_store_says_so(self, store: GistStore, make_item) -> None:
        store.close()

        with pytest.raises(BadInput, match="closed"):
            store.get(GistKey("s", "x"))
        with pytest.raises(BadInput, match="closed"):
            store.put_many("s", [make_item(1)])


class TestPutting:
    def test_what_was_put_is_got(self, store: GistStore, make_item) -> None:
        items = [make_item(number) for number in range(20)]

        assert store.put_many("s", items) == 20

        assert all(equal(store.get(key_of(passage)), packed) for passage, packed in items)
        assert [store.passage(passage.content) for passage, _ in items] == [p for p, _ in items]

    def test_a_gist_already_there_is_not_written_again(self, store: GistStore, make_item) -> None:
        store.put_many("s", [make_item(1)])

        assert store.put_many("s", [make_item(1), make_item(1), make_item(2), make_item(2)]) == 1
        assert store.stats().entries == 2
        assert store.stats().dead_bytes == 0

    def test_a_gist_is_overwritten_on_demand(self, store: GistStore, make_item) -> None:
        passage, old = make_item(1)
        _, new = make_item(2)
        store.put_many("s", [(passage, old)])
        store.get(key_of(passage))

        assert store.put_many("s", [(passage, new)], replace=True) == 1
        assert equal(store.get(key_of(passage)), new)

    def test_spaces_are_kept_apart(self, store: GistStore, make_item) -> None:
        passage, packed = make_item(1)
        store.add_space("t", {})
        store.put_many("s", [(passage, packed)])

        assert store.get(key_of(passage, "t")) is None
        assert store.missing("t", [passage.content]) == [passage.content]
        assert store.missing("s", [passage.content, "other"]) == ["other"]

    def test_a_space_must_be_announced(self, store: GistStore, make_item) -> None:
        with pytest.raises(BadInput, match="call add_space first"):
            store.put_many("nowhere", [make_item(1)])

    def test_a_space_that_is_known_takes_no_lock(self, store: GistStore) -> None:
        store.release()
        with GistStore.open(store.path) as other:
            other.add_space("s", {"codec": "changed"})

            store.add_space("s", {"codec": "changed"})

    def test_a_description_must_be_json(self, store: GistStore) -> None:
        with pytest.raises(BadInput, match="description of space 't' is not JSON"):
            store.add_space("t", {"dtype": torch.float32})

    def test_passages_keep_their_order_and_fields(self, store: GistStore, make_item) -> None:
        passages = [
            Passage(f"text {n}", id=str(n), metadata={"page": n, "tags": ["a", None]})
            for n in (5, 1, 3)
        ]
        store.add_space("t", {})
        store.put_many("s", [(passage, make_item(1)[1]) for passage in passages])
        store.put_many("t", [(passage, make_item(1)[1]) for passage in passages[1:]])

        assert list(store.passages()) == passages
        assert list(store.passages("t")) == passages[1:]
        assert store.contents("t") == [passage.content for passage in passages[1:]]

    def test_metadata_beyond_json_are_kept_as_text(self, store: GistStore, make_item) -> None:
        passage = Passage("text", metadata={"date": datetime.date(2024, 5, 17)})
        store.put_many("s", [(passage, make_item(1)[1])])

        kept = store.passage(passage.content)
        assert kept is not None
        assert kept.metadata == {"date": "2024-05-17"}

    def test_a_batch_that_fails_half_way_leaves_nothing(self, store: GistStore, make_item) -> None:
        good, (_, packed) = make_item(1), make_item(2)
        bad = Passage("text", metadata={("a", "tuple"): 1})
        before = store.generation

        with pytest.raises(BadInput, match="not JSON"):
            store.put_many("s", [good, (bad, packed)])

        assert (store.stats().entries, store.stats().passages) == (0, 0)
        assert store.generation == before
        assert list((store.path / "shards").iterdir()) == []

    def test_a_full_disk_leaves_nothing_half_written(self, tmp_path: Path, fork, make_item) -> None:
        first, rest = make_item(0), [make_item(number) for number in range(1, 200)]

        def fill() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
            with GistStore.open(tmp_path) as store:
                store.add_space("s", {})
                store.put_many("s", [first])
                with pytest.raises(StoreWriteError, match="File too large"):
                    store.put_many("s", rest)
                assert equal(store.get(key_of(first[0])), first[1])

        process = fork(fill)
        process.join()
        assert process.exitcode == 0
        with GistStore.open(tmp_path) as store:
            assert [passage.id for passage in store.passages()] == ["doc-0"]
            assert store.stats().live_bytes == (tmp_path / "shards/000001.gist").stat().st_size

    def test_the_generation_changes_with_every_commit(self, store: GistStore, make_item) -> None:
        passage, packed = make_item(1)
        with GistStore.open(store.path, read_only=True) as reader:
            seen = [reader.generation]
            for write in (
                lambda: store.put_many("s", [(passage, packed)]),
                lambda: store.delete(passage.content),
                lambda: store.compact(),
            ):
                write()
                seen.append(reader.generation)
            store.get(key_of(passage))

            assert len(set(seen)) == 4
            assert reader.generation == seen[-1] == store.generation


class TestWriters:
    def test_two_stores_cannot_write(self, store: GistStore, make_item) -> None:
        store.put_many("s", [make_item(1)])

        with GistStore.open(store.path) as other, pytest.raises(StoreLocked, match="written to"):
            other.put_many("s", [make_item(2)])

    def test_two_processes_cannot_write(self, store: GistStore, fork, make_item) -> None:
        store.put_many("s", [make_item(1)])

        def attempt() -> None:
            with GistStore.open(store.path) as other, pytest.raises(StoreLocked):
                other.put_many("s", [make_item(2)])

        process = fork(attempt)
        process.join()
        assert process.exitcode == 0

    def test_a_writer_that_lets_go_lets_others_write(self, store: GistStore, make_item) -> None:
        store.put_many("s", [make_item(1)])
        store.release()
        with GistStore.open(store.path) as other:
            assert other.put_many("s", [make_item(2)]) == 1

        assert store.put_many("s", [make_item(3)]) == 1
        assert store.stats().entries == 3

    def test_reading_takes_no_lock(self, store: GistStore, make_item) -> None:
        passage, packed = make_item(1)
        store.put_many("s", [(passage, packed)])

        with GistStore.open(store.path) as other:
            assert equal(other.get(key_of(passage)), packed)


class TestDamage:
    @pytest.fixture
    def stored(self, store: GistStore, make_item) -> list[tuple[Passage, PackedState]]:
        items = [make_item(number) for number in range(4)]
        store.put_many("s", items)
        return items

    @pytest.fixture
    def shard(self, store: GistStore, stored: object) -> Path:
        return store.path / "shards" / "000001.gist"

    @pytest.mark.parametrize("place", [0, 9, 13, 17, 60, 300, 1000, -1])
    def test_a_flipped_bit_is_a_miss(
        self, store: GistStore, stored, shard: Path, place: int, caplog: pytest.LogCaptureFixture
    ) -> None:
        blob = bytearray(shard.read_bytes())
        blob[place] ^= 1
        shard.write_bytes(blob)
        broken, intact = (0, 3) if place >= 0 else (3, 0)
        key = key_of(stored[broken][0])

        with caplog.at_level(logging.WARNING, logger="gist_rag"):
            assert store.get(key) is None
            assert store.get(key) is None

        assert len(caplog.records) == 1
        assert key.content in caplog.text
        assert store.corrupt == {key}
        assert equal(store.get(key_of(stored[intact][0])), stored[intact][1])

    def test_verify_names_what_is_broken_and_why(
        self, store: GistStore, stored, shard: Path
    ) -> None:
        blob = bytearray(shard.read_bytes())
        blob[100] ^= 128
        shard.write_bytes(blob)

        ((key, reason),) = store.verify()

        assert key == key_of(stored[0][0])
        assert "have changed" in reason

    def test_a_truncated_shard_loses_its_last_gists_only(
        self, store: GistStore, stored, shard: Path
    ) -> None:
        shard.write_bytes(shard.read_bytes()[:-1])

        found = store.fetch(key_of(passage) for passage, _ in stored)

        assert [packed is None for packed in found] == [False, False, False, True]

    def test_a_lost_shard_is_a_miss_for_all_its_gists(
        self, store: GistStore, stored, shard: Path
    ) -> None:
        shard.unlink()

        assert store.fetch(key_of(passage) for passage, _ in stored) == [None] * 4

    def test_a_broken_gist_is_missing_until_it_is_put_again(
        self, store: GistStore, stored, shard: Path
    ) -> None:
        shard.write_bytes(b"\0" * shard.stat().st_size)
        contents = [passage.content for passage, _ in stored]
        store.fetch(GistKey("s", content) for content in contents)
        assert store.missing("s", contents) == contents

        assert store.put_many("s", stored) == 4

        assert store.missing("s", contents) == []
        assert store.corrupt == frozenset()
        assert all(equal(store.get(key_of(passage)), packed) for passage, packed in stored)

    def test_putting_heals_what_nobody_has_noticed_yet(
        self, store: GistStore, stored, shard: Path
    ) -> None:
        shard.write_bytes(shard.read_bytes()[:-1])

        assert store.put_many("s", stored) == 1
        assert list(store.verify()) == []

    def test_a_gist_in_memory_outlives_its_file(
        self, store: GistStore, stored, shard: Path
    ) -> None:
        passage, packed = stored[0]
        store.get(key_of(passage))
        shard.write_bytes(b"")

        assert equal(store.get(key_of(passage)), packed)

    def test_compaction_leaves_broken_gists_behind(
        self, store: GistStore, stored, shard: Path
    ) -> None:
        store.delete(stored[0][0].content)
        blob = bytearray(shard.read_bytes())
        blob[-1] ^= 1
        shard.write_bytes(blob)

        store.compact()

        assert store.contents("s") == [passage.content for passage, _ in stored[1:3]]
        assert list(store.verify()) == []
        assert store.put_many("s", stored[1:]) == 1


class TestDamagedManifest:
    @pytest.fixture
    def items(self, make_item) -> list[tuple[Passage, PackedState]]:
        return [make_item(number) for number in range(12)]

    @pytest.fixture
    def whole(self, store: GistStore, items) -> Path:
        store.put_many("s", items)
        store.close()
        return store.path

    def test_a_changed_text_is_left_out_and_logged(
        self, whole: Path, items, caplog: pytest.LogCaptureFixture
    ) -> None:
        manifest = whole / "manifest.sqlite"
        manifest.write_bytes(manifest.read_bytes().replace(b"number 7.", b"number 8."))

        with GistStore.open(whole) as store:
            assert store.passage(items[7][0].content) is None
            assert list(store.passages()) == [p for p, _ in items[:7] + items[8:]]
        assert "its text has changed" in caplog.text

    @pytest.mark.parametrize("name", [b"format", b"generation"], ids=bytes.decode)
    def test_a_lost_number_is_named(self, whole: Path, name: bytes) -> None:
        manifest = whole / "manifest.sqlite"
        blob = manifest.read_bytes()
        place = blob.rindex(name)
        manifest.write_bytes(blob[:place] + b"?" + blob[place + 1 :])

        with (
            pytest.raises(CorruptEntry, match=f"states no {name.decode()}"),
            GistStore.open(whole) as store,
        ):
            store.generation  # noqa: B018 - reading it is the act

    @pytest.mark.parametrize("seed", range(20))
    def test_random_damage_never_gives_a_wrong_answer(self, whole: Path, items, seed: int) -> None:
        manifest = whole / "manifest.sqlite"
        blob = bytearray(manifest.read_bytes())
        used = [place for place, byte in enumerate(blob) if byte]
        generator = random.Random(seed)
        for _ in range(generator.choice([1, 3, 20])):
            blob[generator.choice(used)] = generator.randrange(256)
        manifest.write_bytes(blob)

        with contextlib.suppress(GistRagError), GistStore.open(whole) as store:
            for passage, packed in items:
                with contextlib.suppress(GistRagError):
                    assert equal(store.get(key_of(passage)) or packed, packed)
                    assert (store.passage(passage.content) or passage).text == passage.text
            for use in (
                store.spaces,
                store.stats,
                lambda: list(store.passages("s")),
                lambda: list(store.verify()),
                lambda: store.put_many("s", items),
                store.compact,
            ):
                with contextlib.suppress(GistRagError):
                    use()


class TestForgetting:
    def test_a_deleted_gist_is_a_miss_everywhere(self, store: GistStore, make_item) -> None:
        passage, packed = make_item(1)
        store.put_many("s", [(passage, packed)])
        with GistStore.open(store.path, read_only=True) as other:
            store.get(key_of(passage))
            other.get(key_of(passage))

            assert store.delete(passage.content) == 1

            assert [s.get(key_of(passage)) for s in (store, other)] == [None, None]
            assert [s.passage(passage.content) for s in (store, other)] == [None, None]
            assert [s.stats().memory_bytes for s in (store, other)] == [0, 0]

    def test_a_text_stays_as_long_as_a_space_has_its_gist(
        self, store: GistStore, make_item
    ) -> None:
        passage, packed = make_item(1)
        store.add_space("t", {})
        store.put_many("s", [(passage, packed)])
        store.put_many("t", [(passage, packed)])

        assert store.delete(passage.content, "s") == 1
        assert store.passage(passage.content) == passage
        assert equal(store.get(key_of(passage, "t")), packed)

        assert store.delete(passage.content) == 1
        assert store.passage(passage.content) is None

    def test_deleting_the_unknown_deletes_nothing(self, store: GistStore) -> None:
        assert store.delete(content_key("never seen")) == 0

    def test_a_deleted_gist_stays_deleted_and_may_come_back(
        self, store: GistStore, make_item
    ) -> None:
        passage, packed = make_item(1)
        store.put_many("s", [(passage, packed)])
        store.delete(passage.content)
        store.close()

        with GistStore.open(store.path) as again:
            assert again.get(key_of(passage)) is None
            assert again.put_many("s", [(passage, packed)]) == 1
            assert equal(again.get(key_of(passage)), packed)

    @pytest.mark.parametrize("others", [0, 5])
    def test_compaction_removes_every_byte_of_a_deleted_passage(
        self, store: GistStore, make_item, make_state, tmp_path: Path, others: int
    ) -> None:
        secret = Passage("The launch code is 4711. " * 500, metadata={"who": "a secret agent"})
        packed = pack(make_state(99, size=64, text="verbalised: launch at dawn"), "bf16")
        payload = packed.tensors["keys"].view(torch.uint8).numpy().tobytes()
        needles = [b"launch code", b"secret agent", b"launch at dawn", payload[:200]]
        kept = [make_item(number) for number in range(others)]
        store.put_many("s", [*kept[:2], (secret, packed), *kept[2:]])
        copies = (tmp_path / f"copy-{number}" for number in itertools.count())
        assert all(files_with(store.path, needle, next(copies)) for needle in needles)

        with GistStore.open(store.path, read_only=True) as reader:
            reader.get(key_of(secret))
            store.delete(secret.content)
            store.compact()

            found = [files_with(store.path, needle, next(copies)) for needle in needles]
            assert found == [[], [], [], []]
            assert [passage.id for passage in reader.passages()] == [p.id for p, _ in kept]
            assert all(equal(reader.get(key_of(p)), packed) for p, packed in kept)
        assert store.stats().dead_bytes == 0

    def test_compaction_gives_the_disk_space_back(self, store: GistStore, make_item) -> None:
        _, packed = make_item(1)
        passages = [Passage(f"{number} is a long story. " * 200) for number in range(50)]
        store.put_many("s", [(passage, packed) for passage in passages])
        store.compact()
        before = sum(path.stat().st_size for path in store.path.rglob("*") if path.is_file())
        for passage in passages[1:]:
            store.delete(passage.content)

        store.compact()

        after = sum(path.stat().st_size for path in store.path.rglob("*") if path.is_file())
        assert after < before / 3

    def test_compaction_leaves_full_shards_alone(self, tmp_path: Path, make_item) -> None:
        items = [make_item(number) for number in range(12)]
        with GistStore.open(tmp_path, shard_bytes=10_000) as store:
            store.add_space("s", {})
            store.put_many("s", items)
            before = {path.name for path in (tmp_path / "shards").iterdir()}
            assert len(before) > 2
            store.delete(items[0][0].content)

            store.compact()

            after = {path.name for path in (tmp_path / "shards").iterdir()}
            assert before - after == {"000001.gist"}
            assert len(after - before) == 1
            assert all(equal(store.get(key_of(p)), packed) for p, packed in items[1:])

    def test_a_shard_number_is_never_given_again(self, store: GistStore, make_item) -> None:
        passage, packed = make_item(1)
        for number in (1, 2, 3):
            store.put_many("s", [(passage, packed)])
            assert [p.name for p in (store.path / "shards").iterdir()] == [f"00000{number}.gist"]
            store.delete(passage.content)
            store.compact()


class TestCounting:
    def test_stats_add_up(self, store: GistStore, make_item) -> None:
        items = [make_item(number) for number in range(3)]
        store.put_many("s", items)
        store.delete(items[0][0].content)
        store.fetch(key_of(passage) for passage, _ in (*items, items[1]))

        stats = store.stats()

        sizes = [len(to_bytes(packed)) for _, packed in items]
        assert (stats.entries, stats.passages, stats.shards) == (2, 2, 1)
        assert (stats.live_bytes, stats.dead_bytes) == (sum(sizes[1:]), sizes[0])
        assert (stats.num_tokens, stats.num_slots) == (2 * 40, 2 * 9)
        assert (stats.memory_hits, stats.memory_misses) == (1, 2)
        assert stats.memory_bytes == sum(packed.num_bytes for _, packed in items[1:])

    def test_a_store_without_memory_reads_from_disk(self, tmp_path: Path, make_item) -> None:
        passage, packed = make_item(1)
        with GistStore.open(tmp_path, memory_bytes=0) as store:
            store.add_space("s", {})
            store.put_many("s", [(passage, packed)])

            assert equal(store.get(key_of(passage)), packed)
            assert equal(store.get(key_of(passage)), packed)
            assert store.stats().memory_hits == 0

    @pytest.mark.parametrize("options", [{"memory_bytes": -1}, {"shard_bytes": 0}], ids=str)
    def test_absurd_sizes_are_refused(self, tmp_path: Path, options: dict[str, int]) -> None:
        with pytest.raises(BadInput, match="at least"):
            GistStore.open(tmp_path, **options)


class TestVectors:
    def test_come_back_in_16_bits(self, store: GistStore, make_item) -> None:
        store.put_many("s", [make_item(0), make_item(1)])
        contents = [make_item(n)[0].content for n in range(3)]
        vectors = np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32)
        store.put_vectors("minilm", dict(zip(contents, vectors, strict=True)))
        found = store.vectors("minilm", contents)
        assert found.keys() == set(contents[:2])  # nothing is kept of a passage that is not here
        for content, vector in zip(contents[:2], vectors, strict=False):
            assert found[content].dtype == np.float32
            np.testing.assert_allclose(found[content], vector, rtol=1e-3)
        assert store.vectors("another", contents) == {}

    def test_go_with_their_passage(self, store: GistStore, make_item) -> None:
        """And not before its last gist."""
        store.add_space("t", {})
        for space in ("s", "t"):
            store.put_many(space, [make_item(0)])
        content = make_item(0)[0].content
        store.put_vectors("minilm", {content: np.ones(4, np.float32)})
        store.delete(content, "s")
        assert content in store.vectors("minilm", [content])
        store.delete(content, "t")
        store.put_many("s", [make_item(0)])
        assert store.vectors("minilm", [content]) == {}

    @pytest.mark.parametrize("damage", ["x'00'", "x''", "'text'", "vector || x'00'", "1"])
    def test_a_damaged_one_is_missing(self, store: GistStore, make_item, damage: str) -> None:
        store.put_many("s", [make_item(0)])
        content = make_item(0)[0].content
        store.put_vectors("minilm", {content: np.ones(4, np.float32)})
        with sqlite3.connect(store.path / "manifest.sqlite") as connection:
            connection.execute(f"UPDATE vectors SET vector = {damage}")
        connection.close()
        assert store.vectors("minilm", [content]) == {}

    def test_a_store_from_before_there_were_any_gets_them(
        self, store: GistStore, make_item
    ) -> None:
        store.put_many("s", [make_item(0)])
        store.release()
        with sqlite3.connect(store.path / "manifest.sqlite") as connection:
            connection.execute("DROP TABLE vectors")
        connection.close()
        content = make_item(0)[0].content
        with GistStore.open(store.path, read_only=True) as reader:
            assert reader.vectors("minilm", [content]) == {}
        store.put_vectors("minilm", {content: np.ones(4, np.float32)})
        assert content in store.vectors("minilm", [content])
