"""Bytes <> place: append-only shard files ``shards/000001.gist``, ``shards/000002.gist``, ...

A shard knows nothing of what it holds. The manifest says which bytes count; whatever lies beyond
them was left by a writer that was killed, and ``recover`` cuts it off.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from gist_rag.errors import CorruptEntry


@dataclass(frozen=True)
class Place:
    """Where a blob lies. A store never gives one place to two blobs.

    ``checksum`` covers the blob and its label, so that no blob is ever taken for another.
    """

    shard: int
    offset: int
    length: int
    checksum: int

    @property
    def end(self) -> int:
        return self.offset + self.length


class Shards:
    """The shard files of one store. Holds no open file, so it can be used by many threads."""

    def __init__(self, folder: Path, shard_bytes: int) -> None:
        self.folder = folder
        self.shard_bytes = shard_bytes

    def read(self, place: Place, label: str) -> memoryview:
        """The blob at a place, checked, in memory of its own.

        It is read rather than mapped. Mapped bytes may be fetched from the disk again long after
        they were checked, and kill the process (SIGBUS) if the file was cut or the disk fails.

        Raises:
            CorruptEntry: the bytes are gone, cut short or changed, or bear another label.
        """
        try:
            with self._path(place.shard).open("rb") as file:
                if os.fstat(file.fileno()).st_size < place.end:
                    raise CorruptEntry(f"{place} lies beyond the end of its file")
                blob = bytearray(place.length)
                file.seek(place.offset)
                file.readinto(blob)
        # A damaged manifest may ask for anything, even for what is not a number.
        except (OSError, OverflowError, TypeError, ValueError) as error:
            raise CorruptEntry(f"{place} cannot be read: {error}") from error
        if _checksum(blob, label) != place.checksum:
            raise CorruptEntry(f"the bytes at {place} have changed")
        return memoryview(blob)

    def append(
        self,
        blobs: Iterable[tuple[str, bytes | memoryview]],
        committed: Mapping[int, int],
        next_shard: int,
    ) -> list[Place]:
        """Write blobs behind the committed bytes and return once the disk has them.

        Args:
            blobs: labels, which are not stored, and bytes, which are.
            committed: shard > bytes that count; the highest shard is continued.
            next_shard: number of the next new shard; begun when the last one is full, or when
                ``committed`` is empty.
        """
        shard = max(committed, default=0)
        end = committed.get(shard, 0)
        places = []
        if not self.folder.exists():
            self.folder.mkdir()
            _sync(self.folder.parent)
        for label, blob in blobs:
            if not shard or (end and end + len(blob) > self.shard_bytes):
                shard, end, next_shard = next_shard, 0, next_shard + 1
            place = Place(shard, end, len(blob), _checksum(blob, label))
            self._write(place, blob)
            places.append(place)
            end = place.end
        for path in {self._path(place.shard) for place in places} | {self.folder}:
            _sync(path)
        return places

    def recover(self, committed: Mapping[int, int]) -> None:
        """Cut every shard to its committed length and delete those that are not known."""
        for shard, path in self._files():
            if shard not in committed:
                path.unlink()
            elif path.stat().st_size > committed[shard]:
                os.truncate(path, committed[shard])

    def _path(self, shard: int) -> Path:
        return self.folder / f"{shard:06d}.gist"

    def _files(self) -> Iterator[tuple[int, Path]]:
        for path in sorted(self.folder.glob("*.gist")):
            if path.stem.isdecimal():
                yield int(path.stem), path

    def _write(self, place: Place, blob: bytes | memoryview) -> None:
        descriptor = os.open(self._path(place.shard), os.O_WRONLY | os.O_CREAT, 0o666)
        with os.fdopen(descriptor, "wb") as file:
            file.seek(place.offset)
            file.write(blob)


def _checksum(blob: bytes | bytearray | memoryview, label: str) -> int:
    """CRC-32: a guard against accidents, some times faster than the quickest hash."""
    return zlib.crc32(blob, zlib.crc32(label.encode()))


def _sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
