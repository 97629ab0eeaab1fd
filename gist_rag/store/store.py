"""GistStore: gists and their passages in one folder, shared by many readers and one writer.

::

    store/
      manifest.sqlite    which gists there are, and where
      shards/*.gist      their bytes
      writer.lock        held by the one process that writes
"""

from __future__ import annotations

import logging
import os
import threading
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from gist_rag.errors import BadInput, CorruptEntry, StoreLocked, StoreWriteError
from gist_rag.store.codec import from_bytes, num_slots, to_bytes
from gist_rag.store.lock import WriterLock
from gist_rag.store.manifest import WINDOWS_SINCE, Manifest, Record
from gist_rag.store.shards import Place, Shards
from gist_rag.store.tiers import MemoryTier
from gist_rag.store.windows import WindowFilter, WindowTable
from gist_rag.types import GistKey, PackedState, Passage
from gist_rag.windows import Index, MemoryIndex

MEMORY_BYTES = 512 * 2**20
SHARD_BYTES = 256 * 2**20

_MANIFEST = "manifest.sqlite"
_SHARDS = "shards"
_LOCK = "writer.lock"

Vector: TypeAlias = NDArray[np.float32]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StoreStats:
    """What a store holds, and how its memory tier has fared since it was opened.

    Attributes:
        entries: gists, over all spaces.
        passages: texts.
        num_tokens: source tokens over all entries.
        num_slots: kept slots ``M`` over all entries.
        live_bytes: bytes of entries in the shards.
        dead_bytes: bytes of deleted or replaced ones, which ``compact`` gives back.
        shards: shard files.
        memory_bytes: bytes now in the memory tier.
        memory_hits: gists served from memory.
        memory_misses: gists that had to come from disk.
    """

    entries: int
    passages: int
    num_tokens: int
    num_slots: int
    live_bytes: int
    dead_bytes: int
    shards: int
    memory_bytes: int
    memory_hits: int
    memory_misses: int


class GistStore:
    """Packed gists by ``GistKey``, and the passages they were made of. Open it with ``open``.

    Any number of processes and threads may read while one process writes; readers take no lock.
    A batch becomes visible as a whole, once its bytes are on the disk, so a writer that is killed
    leaves the store as it was after its last batch. A broken gist is a miss, never an error; a
    manifest that SQLite can no longer read raises ``CorruptEntry``, from any method. Open a store
    after forking, not before.
    """

    def __init__(self, path: Path, *, read_only: bool, memory_bytes: int, shard_bytes: int) -> None:
        self.path = path
        self.read_only = read_only
        self._manifest = Manifest(path / _MANIFEST)
        self._shards = Shards(path / _SHARDS, shard_bytes)
        self._memory = MemoryTier(memory_bytes)
        self._window_filter = WindowFilter(self._manifest)
        self._old_index: tuple[str, int, MemoryIndex] | None = None
        self._corrupt: set[GistKey] = set()
        self._corrupt_lock = threading.Lock()
        self._lock = WriterLock(path / _LOCK)
        self._writer: Manifest | None = None
        self._writer_lock = threading.RLock()
        self._closed = False

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        create: bool = True,
        read_only: bool = False,
        memory_bytes: int = MEMORY_BYTES,
        shard_bytes: int = SHARD_BYTES,
    ) -> GistStore:
        """Open the store in a folder.

        Args:
            create: make an empty store if there is none; ``read_only`` never does.
            read_only: refuse to write. A folder that cannot be written to can only be opened so;
                it must not change meanwhile.
            memory_bytes: budget of the memory tier.
            shard_bytes: size at which a new shard file is begun.

        Raises:
            BadInput: there is no store, and none is to be made.
            StoreWriteError: the folder is not a store, or its permissions do not suffice.
            FormatTooNew: a newer gist-rag made the store.
        """
        if memory_bytes < 0 or shard_bytes < 1:
            raise BadInput(
                f"memory_bytes is {memory_bytes} and shard_bytes {shard_bytes}; "
                "they must be at least 0 and 1"
            )
        folder = Path(path).absolute()
        try:
            _check_folder(folder)
            if create and not read_only:
                _create(folder)
            if not Manifest.exists(folder / _MANIFEST):
                raise BadInput(f"no store at {folder}; make one with gist-rag precompute")
            if not read_only and not os.access(folder, os.W_OK):
                raise StoreWriteError(
                    f"no permission to write to {folder}; open it with read_only=True"
                )
        except OSError as error:
            raise StoreWriteError(f"cannot open a store at {folder}: {error}") from error
        return cls(folder, read_only=read_only, memory_bytes=memory_bytes, shard_bytes=shard_bytes)

    def close(self) -> None:
        self._closed = True
        self.release()
        self._manifest.close()

    def __enter__(self) -> GistStore:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def generation(self) -> int:
        """A number that every commit to this store raises, by whatever process."""
        return self._manifest.generation()

    @property
    def corrupt(self) -> frozenset[GistKey]:
        """Gists found broken and not yet rewritten; ``put_many`` heals them."""
        with self._corrupt_lock:
            return frozenset(self._corrupt)

    def spaces(self) -> dict[str, dict[str, object]]:
        """Space > its description, oldest first."""
        return self._manifest.spaces()

    def get(self, key: GistKey) -> PackedState | None:
        """A gist, from memory or disk; ``None`` when there is none or it is broken.

        A broken one is logged once, remembered in ``corrupt``, and may be put again. The state is
        shared with other callers: do not write into its tensors.
        """
        place = self._manifest.find(key)
        if place is None:
            self._memory.drop(key)
            return None
        packed = self._memory.get(key, place)
        if packed is not None:
            return packed
        try:
            loaded = self._load(key)
        except CorruptEntry as error:
            self._report(key, error)
            return None
        if loaded is None:
            return None
        place, packed = loaded
        self._memory.put(key, place, packed)
        return packed

    def fetch(self, keys: Iterable[GistKey]) -> list[PackedState | None]:
        """``get`` for each key, in order."""
        return [self.get(key) for key in keys]

    def contains(self, key: GistKey) -> bool:
        """Whether there is a gist, as far as is known without reading it."""
        with self._corrupt_lock:
            broken = key in self._corrupt
        return not broken and self._manifest.find(key) is not None

    def missing(self, space: str, contents: Iterable[str]) -> list[str]:
        """Those contents that have no gist in a space, or one known to be broken."""
        return [content for content in contents if not self.contains(GistKey(space, content))]

    def contents(self, space: str) -> list[str]:
        """Contents that have a gist in a space, in the order their passages came."""
        return self._manifest.contents(space)

    def passage(self, content: str) -> Passage | None:
        return self._manifest.passage(content)

    def passages(self, space: str | None = None) -> Iterator[Passage]:
        """Passages in the order they came; with a space, those that have a gist there."""
        return self._manifest.passages(space)

    def vectors(self, embedder: str, contents: Iterable[str]) -> dict[str, Vector]:
        """Vectors ``(d,)`` of those contents that have one of an embedder; a broken one is missing.

        Args:
            embedder: its name.
        """
        stored = self._manifest.vectors(embedder, {*contents})
        return {c: v for c, blob in stored.items() if (v := _vector(blob)) is not None}

    def put_vectors(self, embedder: str, vectors: Mapping[str, Vector]) -> None:
        """Store vectors ``(d,)`` of passages by content, in 16 bits; they go with their passages.

        Those of contents that are not here are left out.

        Raises:
            StoreLocked, StoreWriteError: see ``put_many``.
        """
        with self._writing() as manifest:
            manifest.add_vectors(embedder, {c: _blob(v) for c, v in vectors.items()})

    def index(self, space: str) -> Index:
        """Where prompts are searched for the passages of a space; it follows every commit.

        A store of an older format is upgraded for it. Where that may not be, or not now, its
        passages are indexed in memory.
        """
        if self._manifest.format() >= WINDOWS_SINCE or self._try_to_upgrade():
            return WindowTable(self._manifest, self._window_filter, space)
        made, generation = self._old_index, self.generation
        if made is None or made[:2] != (space, generation):
            made = space, generation, MemoryIndex()
            for passage in self.passages(space):
                made[2].add(passage.text)
            self._old_index = made
        return made[2]

    def stats(self) -> StoreStats:
        totals = self._manifest.totals()
        return StoreStats(
            entries=totals.entries,
            passages=totals.passages,
            num_tokens=totals.num_tokens,
            num_slots=totals.num_slots,
            live_bytes=totals.live_bytes,
            dead_bytes=totals.total_bytes - totals.live_bytes,
            shards=totals.shards,
            memory_bytes=self._memory.num_bytes,
            memory_hits=self._memory.hits,
            memory_misses=self._memory.misses,
        )

    def verify(self) -> Iterator[tuple[GistKey, str]]:
        """Read every gist from disk; yield the broken ones, and why."""
        for key in self._manifest.entries():
            try:
                self._load(key)
            except CorruptEntry as error:
                self._report(key, error)
                yield key, str(error)

    def add_space(self, space: str, description: Mapping[str, object]) -> None:
        """Announce a space before its first gist; ``description`` is JSON and may be updated."""
        if self.spaces().get(space) == description:
            return
        with self._writing() as manifest:
            manifest.add_space(space, description)

    def put_many(
        self,
        space: str,
        items: Sequence[tuple[Passage, PackedState]],
        *,
        replace: bool = False,
    ) -> int:
        """Store a batch in one commit, all or nothing.

        Args:
            space: announced with ``add_space``.
            items: passages and their packed states; of a content given twice, the first counts.
            replace: overwrite gists that are there; otherwise only broken ones are.

        Returns:
            How many gists were written.

        Raises:
            StoreLocked: somebody else is writing.
            StoreWriteError: the disk is full, or refuses for another reason.
        """
        with self._writing() as manifest:
            if space not in manifest.spaces():
                raise BadInput(f"space {space!r} is unknown to {self.path}; call add_space first")
            fresh: dict[str, tuple[Passage, PackedState]] = {}
            for passage, packed in items:
                if passage.content in fresh:
                    continue
                if replace or not self._is_intact(GistKey(space, passage.content)):
                    fresh[passage.content] = (passage, packed)
            if not fresh:
                return 0
            with self._undone_on_error(manifest):
                blobs = (
                    (_label(GistKey(space, content)), to_bytes(packed))
                    for content, (_, packed) in fresh.items()
                )
                places = self._shards.append(blobs, manifest.shards(), manifest.next_shard())
                records = [
                    Record(passage, place, packed.num_tokens, num_slots(packed))
                    for (passage, packed), place in zip(fresh.values(), places, strict=True)
                ]
                manifest.add(space, records)
            self._unmark(GistKey(space, content) for content in fresh)
            return len(fresh)

    def delete(self, content: str, space: str | None = None) -> int:
        """Forget a content in one space or in all, and its text once no space has a gist of it.

        It is a miss at once, for every reader of this store; ``compact`` removes the bytes.

        Returns:
            How many gists were deleted.
        """
        with self._writing() as manifest:
            deleted = manifest.delete(content, space)
            keys = [
                GistKey(name, content) for name in (self.spaces() if space is None else [space])
            ]
            for key in keys:
                self._memory.drop(key)
            self._unmark(keys)
            return deleted

    def compact(self) -> None:
        """Remove every deleted byte: rewrite shards that hold some, and the manifest.

        Live gists are copied to new shards, the manifest turns to these in one commit, and only
        then the old shards go; killed in between, the next writer cleans up. A broken gist is left
        behind, with a warning. Needs free space for the copies.
        """
        with self._writing() as manifest:
            freed = manifest.wasteful_shards()
            if freed:
                with self._undone_on_error(manifest):
                    self._rewrite(manifest, freed)
                self._shards.recover(manifest.shards())
            manifest.vacuum()

    def acquire(self) -> None:
        """Keep others from writing until ``release``, as any write does.

        Raises:
            StoreLocked, StoreWriteError: it cannot be written.
        """
        with self._writing():
            pass

    @contextmanager
    def released(self) -> Iterator[None]:
        """Let others write afterwards."""
        try:
            yield
        finally:
            self.release()

    def release(self) -> None:
        """Let others write; the next write takes the lock again."""
        with self._writer_lock:
            if self._writer is not None:
                self._writer.close()
                self._writer = None
            self._lock.release()

    def _try_to_upgrade(self) -> bool:
        """Bring the store to our format, unless it is read-only or somebody else is writing."""
        if self.read_only:
            return False
        writes = self._writer is not None
        try:
            self.acquire()
        except (StoreLocked, StoreWriteError) as error:
            logger.info("%s stays in its older format for now: %s", self.path, error)
            return False
        if not writes:
            self.release()
        return True

    def _load(self, key: GistKey) -> tuple[Place, PackedState] | None:
        """Read a gist from disk, and say from where; ``None`` when there is none.

        Raises:
            CorruptEntry: it is broken, and was not just moved or rewritten by another process.
        """
        place = self._manifest.find(key)
        while place is not None:
            try:
                packed = from_bytes(self._shards.read(place, _label(key)))
            except CorruptEntry:
                failed, place = place, self._manifest.find(key)
                if place == failed:
                    raise
            else:
                self._unmark([key])
                return place, packed
        return None

    def _is_intact(self, key: GistKey) -> bool:
        try:
            return self._load(key) is not None
        except CorruptEntry:
            return False

    def _report(self, key: GistKey, error: CorruptEntry) -> None:
        """Remember a broken gist; log it if that is news."""
        self._memory.drop(key)
        with self._corrupt_lock:
            known = key in self._corrupt
            self._corrupt.add(key)
        if not known:
            logger.warning(
                "gist %s of space %s is broken and counts as a miss: %s",
                key.content,
                key.space,
                error,
            )

    def _unmark(self, keys: Iterable[GistKey]) -> None:
        with self._corrupt_lock:
            self._corrupt.difference_update(keys)

    @contextmanager
    def _writing(self) -> Iterator[Manifest]:
        """The right to write, and the manifest to write to; the first use takes the lock."""
        if self.read_only:
            raise StoreWriteError(f"the store at {self.path} was opened with read_only=True")
        with self._writer_lock:
            if self._closed:
                raise BadInput(f"the store at {self.path} is closed; open it again")
            try:
                if self._writer is None:
                    self._writer = self._begin_writing()
                yield self._writer
            except OSError as error:
                raise StoreWriteError(f"cannot write to {self.path}: {error}") from error

    def _begin_writing(self) -> Manifest:
        self._lock.acquire()
        try:
            manifest = Manifest(self.path / _MANIFEST)
            manifest.upgrade()
            self._shards.recover(manifest.shards())
        except BaseException:
            self._lock.release()
            raise
        return manifest

    @contextmanager
    def _undone_on_error(self, manifest: Manifest) -> Iterator[None]:
        """Take bytes that were not committed off the disk again."""
        try:
            yield
        except BaseException:
            self._shards.recover(manifest.shards())
            raise

    def _rewrite(self, manifest: Manifest, freed: Sequence[int]) -> None:
        kept: list[GistKey] = []

        def blobs() -> Iterator[tuple[str, memoryview]]:
            for key, place in manifest.entries_in(freed):
                try:
                    blob = self._shards.read(place, _label(key))
                except CorruptEntry as error:
                    self._report(key, error)
                else:
                    kept.append(key)
                    yield _label(key), blob

        places = self._shards.append(blobs(), {}, manifest.next_shard())
        manifest.move(list(zip(kept, places, strict=True)), freed)


def _blob(vector: Vector) -> bytes:
    """A vector in float16, and its checksum behind it."""
    numbers = vector.astype("<f2").tobytes()
    return numbers + zlib.crc32(numbers).to_bytes(4, "little")


def _vector(blob: bytes) -> Vector | None:
    """What ``_blob`` wrote; ``None`` where it is damaged."""
    numbers, checksum = blob[:-4], blob[-4:]
    if not numbers or zlib.crc32(numbers).to_bytes(4, "little") != checksum:
        return None
    return np.frombuffer(numbers, dtype="<f2").astype(np.float32)


def _label(key: GistKey) -> str:
    return f"{key.space} {key.content}"


def _check_folder(folder: Path) -> None:
    """Refuse a place that is something else, so that a mistyped path is never written into."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise StoreWriteError(f"{folder} is a file; a store is a folder")
    names = {path.name for path in folder.iterdir()}
    foreign = sorted(names - {_MANIFEST, _SHARDS, _LOCK})
    if foreign and _MANIFEST not in names:
        raise StoreWriteError(
            f"{folder} is not a store folder: it holds {foreign[0]!r} but no {_MANIFEST}; "
            "give a new or an empty folder"
        )


def _create(folder: Path) -> None:
    """Make an empty store, unless there is one, or wait for another process to make it."""
    folder.mkdir(parents=True, exist_ok=True)
    while not Manifest.exists(folder / _MANIFEST):
        try:
            with WriterLock(folder / _LOCK):
                Manifest.create(folder / _MANIFEST)
        except StoreLocked:
            time.sleep(0.01)
