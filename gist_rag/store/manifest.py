"""What a store holds and where: an SQLite file that is the only truth about its shards.

A gist exists once the manifest says so, in one transaction per batch, after the shards are on the
disk. Tables: ``meta`` (format and generation), ``spaces``, ``shards`` (how many bytes count),
``passages`` (texts, in the order they came), ``entries`` (space and content > place), since format
2 ``windows`` (how the passages of the entries begin, by which prompts are searched), and perhaps
``vectors`` (those of embedders, of passages).
"""

from __future__ import annotations

import json
import logging
import os
import sqlite3
import threading
import time
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gist_rag.errors import BadInput, CorruptEntry, FormatTooNew, StoreWriteError
from gist_rag.store.shards import Place
from gist_rag.types import GistKey, Passage, normalise
from gist_rag.windows import WINDOW, Extent, place, window_numbers

FORMAT = 2
WINDOWS_SINCE = 2

logger = logging.getLogger(__name__)

_BUSY_S = 30.0
_PAGE_ROWS = 1000

# ``number`` stands for a space and a window, and only leads to candidates: two may share one.
_WINDOWS = """
CREATE TABLE IF NOT EXISTS windows (
    row INTEGER PRIMARY KEY AUTOINCREMENT,
    number INTEGER NOT NULL,
    lead INTEGER NOT NULL,
    length INTEGER NOT NULL,
    passages INTEGER NOT NULL,
    UNIQUE (number, lead, length)
)
"""

# An older gist-rag does not miss it, so that a store gets it from its next writer.
_VECTORS = """
CREATE TABLE IF NOT EXISTS vectors (
    content TEXT NOT NULL,
    embedder TEXT NOT NULL,
    vector BLOB NOT NULL,
    PRIMARY KEY (content, embedder)
)
"""

# AUTOINCREMENT never gives a number again: a reader that still knows the place of a gist in a
# shard since deleted can find nothing there, but never another gist.
_SCHEMA = f"""
BEGIN IMMEDIATE;
CREATE TABLE IF NOT EXISTS meta (
    name TEXT PRIMARY KEY,
    value INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS spaces (
    space TEXT PRIMARY KEY,
    description TEXT NOT NULL,
    created REAL NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS shards (
    shard INTEGER PRIMARY KEY AUTOINCREMENT,
    length INTEGER NOT NULL
);
CREATE TABLE IF NOT EXISTS passages (
    position INTEGER PRIMARY KEY AUTOINCREMENT,
    content TEXT NOT NULL UNIQUE,
    id TEXT NOT NULL,
    text TEXT NOT NULL,
    metadata TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS entries (
    space TEXT NOT NULL,
    content TEXT NOT NULL,
    shard INTEGER NOT NULL,
    offset INTEGER NOT NULL,
    length INTEGER NOT NULL,
    checksum INTEGER NOT NULL,
    num_tokens INTEGER NOT NULL,
    num_slots INTEGER NOT NULL,
    created REAL NOT NULL,
    PRIMARY KEY (space, content)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS entries_by_content ON entries (content);
{_WINDOWS};
{_VECTORS};
INSERT OR IGNORE INTO meta VALUES ('format', {FORMAT}), ('generation', 0);
COMMIT;
"""

_WASTEFUL_SHARDS = """
SELECT shards.shard FROM shards
LEFT JOIN (SELECT shard, sum(length) AS live FROM entries GROUP BY shard) USING (shard)
WHERE shards.length > coalesce(live, 0)
"""

_TOTALS = """
SELECT
    (SELECT count(*) FROM entries),
    (SELECT count(*) FROM passages),
    (SELECT coalesce(sum(num_tokens), 0) FROM entries),
    (SELECT coalesce(sum(num_slots), 0) FROM entries),
    (SELECT coalesce(sum(length), 0) FROM entries),
    (SELECT coalesce(sum(length), 0) FROM shards),
    (SELECT count(*) FROM shards)
"""


@dataclass(frozen=True)
class Record:
    """A new entry: whose gist it is, where it lies, and its ``T`` tokens and ``M`` slots."""

    passage: Passage
    place: Place
    num_tokens: int
    num_slots: int


@dataclass(frozen=True)
class Totals:
    """Sums over a store; ``live_bytes`` belong to entries, ``total_bytes`` to shards."""

    entries: int
    passages: int
    num_tokens: int
    num_slots: int
    live_bytes: int
    total_bytes: int
    shards: int


class Manifest:
    """One connection to the manifest, shared by the threads of a process.

    A reader keeps its own ``Manifest`` beside the writer's, so that it never waits for a commit.

    Raises:
        FormatTooNew: a newer gist-rag made the store.
        CorruptEntry: from here or any method, when SQLite finds the file damaged.
        StoreWriteError: likewise, when SQLite cannot read or write it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.RLock()
        with _translated(path):
            self._connection = _connect(path, _mode(path))
            # FULL: compaction deletes old shards right after the commit that leaves them.
            self._connection.execute("PRAGMA synchronous = FULL")
        number = self.format()
        if number > FORMAT:
            self.close()
            raise FormatTooNew(
                f"the store at {path.parent} has format {number}, but this gist-rag reads formats "
                f"up to {FORMAT}; upgrade gist-rag"
            )

    @staticmethod
    def exists(path: Path) -> bool:
        """Whether a complete manifest lies at ``path``."""
        if not path.exists():
            return False
        with _translated(path), closing(_connect(path, _mode(path))) as connection:
            query = "SELECT count(*) FROM sqlite_master WHERE name = 'meta'"
            return bool(connection.execute(query).fetchone()[0])

    @staticmethod
    def create(path: Path) -> None:
        """Make an empty manifest, or complete one whose making was cut short."""
        with _translated(path), closing(_connect(path, "mode=rwc")) as connection:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.executescript(_SCHEMA)

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    def format(self) -> int:
        """The format of the store; ``upgrade`` may raise it at any time."""
        return self._meta("format")

    def upgrade(self) -> None:
        """Bring an older store to this format, all or nothing."""
        old = self.format() < FORMAT
        if not old and self._has_vectors():
            return
        with self._transaction():
            self._connection.execute(_VECTORS)
            if not old:
                return
            logger.info("bringing the store at %s to format %s", self.path.parent, FORMAT)
            self._connection.execute(_WINDOWS)
            rows = self._connection.execute(
                "SELECT space, text FROM entries JOIN passages USING (content)"
            )
            self._count_windows(rows)
            self._connection.execute("UPDATE meta SET value = ? WHERE name = 'format'", (FORMAT,))

    def generation(self) -> int:
        """A number that every commit of any process raises."""
        return self._meta("generation")

    def find(self, key: GistKey) -> Place | None:
        rows = self._rows(
            "SELECT shard, offset, length, checksum FROM entries WHERE space = ? AND content = ?",
            (key.space, key.content),
        )
        return Place(*rows[0]) if rows else None

    def known(self, space: str, contents: Collection[str]) -> set[str]:
        """Those of the contents that have an entry in a space."""
        query = (
            "SELECT content FROM entries WHERE space = ? "
            "AND content IN (SELECT value FROM json_each(?))"
        )
        return {content for (content,) in self._rows(query, (space, json.dumps([*contents])))}

    def windows_after(self, row: int, limit: int) -> list[tuple[int, int]]:
        """The next rows of the window table, in the order they came, and their numbers."""
        query = "SELECT row, number FROM windows WHERE row > ? ORDER BY row LIMIT ?"
        rows = self._whole_numbers(self._rows(query, (row, limit)))
        if rows and rows[-1][0] <= row:
            raise _damaged(self.path, "its windows are out of order")
        return rows

    def extents(self, numbers: Collection[int]) -> list[tuple[int, Extent]]:
        """Extents of the passages behind some window numbers."""
        query = (
            "SELECT number, lead, length FROM json_each(?) "
            "CROSS JOIN windows ON windows.number = json_each.value"
        )
        rows = self._whole_numbers(self._rows(query, (json.dumps([*numbers]),)))
        return [(number, (lead, length)) for number, lead, length in rows]

    def spaces(self) -> dict[str, dict[str, object]]:
        rows = self._rows("SELECT space, description FROM spaces ORDER BY created, space")
        with _translated(self.path):
            return {space: json.loads(description) for space, description in rows}

    def contents(self, space: str) -> list[str]:
        """Contents with an entry in a space, in the order their passages came."""
        rows = self._rows(
            "SELECT content FROM entries JOIN passages USING (content) WHERE space = ? "
            "ORDER BY position",
            (space,),
        )
        return [content for (content,) in rows]

    def passage(self, content: str) -> Passage | None:
        rows = self._rows(
            "SELECT content, text, id, metadata FROM passages WHERE content = ?", (content,)
        )
        return _passage(*rows[0]) if rows else None

    def passages(self, space: str | None = None) -> Iterator[Passage]:
        """Passages in the order they came; with a space, those that have an entry there."""
        query = (
            "SELECT position, content, text, id, metadata FROM passages WHERE position > ? AND "
            "(? IS NULL OR EXISTS (SELECT 1 FROM entries WHERE space = ? "
            "AND entries.content = passages.content)) ORDER BY position LIMIT ?"
        )
        last = 0
        while rows := self._rows(query, (last, space, space, _PAGE_ROWS)):
            for _, *fields in rows:
                passage = _passage(*fields)
                if passage is not None:
                    yield passage
            if rows[-1][0] <= last:
                raise _damaged(self.path, "its passages are out of order")
            last = rows[-1][0]

    def vectors(self, embedder: str, contents: Collection[str]) -> dict[str, bytes]:
        """Vectors of those of the contents that have one of an embedder."""
        if not self._has_vectors():
            return {}
        query = (
            "SELECT content, vector FROM vectors WHERE embedder = ? AND typeof(vector) = 'blob' "
            "AND content IN (SELECT value FROM json_each(?))"
        )
        return dict(self._rows(query, (embedder, json.dumps([*contents]))))

    def add_vectors(self, embedder: str, vectors: Mapping[str, bytes]) -> None:
        """Note vectors of known passages by content; those of others are left out."""
        with self._transaction():
            self._connection.executemany(
                "INSERT OR REPLACE INTO vectors SELECT content, ?, ? FROM passages "
                "WHERE content = ?",
                [(embedder, vector, content) for content, vector in vectors.items()],
            )

    def entries(self) -> list[GistKey]:
        """The keys of all entries."""
        return [GistKey(*row) for row in self._rows("SELECT space, content FROM entries")]

    def totals(self) -> Totals:
        return Totals(*self._rows(_TOTALS)[0])

    def shards(self) -> dict[int, int]:
        """Shard > how many of its bytes count."""
        return dict(self._rows("SELECT shard, length FROM shards"))

    def next_shard(self) -> int:
        """A number that no shard ever had."""
        query = "SELECT coalesce(max(seq), 0) + 1 FROM sqlite_sequence WHERE name = 'shards'"
        return int(self._rows(query)[0][0])

    def wasteful_shards(self) -> list[int]:
        """Shards that hold bytes of no entry."""
        return [shard for (shard,) in self._rows(_WASTEFUL_SHARDS)]

    def entries_in(self, shards: Iterable[int]) -> list[tuple[GistKey, Place]]:
        """The entries of some shards, in the order they lie there."""
        query = (
            "SELECT space, content, shard, offset, length, checksum FROM entries "
            "WHERE shard IN (SELECT value FROM json_each(?)) ORDER BY shard, offset"
        )
        rows = self._rows(query, (json.dumps(list(shards)),))
        return [(GistKey(space, content), Place(*place)) for space, content, *place in rows]

    def add_space(self, space: str, description: Mapping[str, object]) -> None:
        try:
            text = json.dumps(dict(description))
        except (TypeError, ValueError) as error:
            raise BadInput(f"the description of space {space!r} is not JSON: {error}") from error
        with self._transaction():
            self._connection.execute(
                "INSERT INTO spaces VALUES (?, ?, ?) "
                "ON CONFLICT (space) DO UPDATE SET description = excluded.description",
                (space, text, time.time()),
            )

    def add(self, space: str, records: Sequence[Record]) -> None:
        """Note a batch, all or nothing; an entry or passage already known is overwritten."""
        passages = [
            (r.passage.content, r.passage.id, r.passage.text, _metadata(r.passage)) for r in records
        ]
        entries = [
            (space, r.passage.content, *_columns(r.place), r.num_tokens, r.num_slots, time.time())
            for r in records
        ]
        texts = {r.passage.content: r.passage.text for r in records}
        with self._transaction():
            fresh = texts.keys() - self.known(space, texts)
            self._count_windows((space, texts[content]) for content in fresh)
            self._connection.executemany(
                "INSERT INTO passages (content, id, text, metadata) VALUES (?, ?, ?, ?) "
                "ON CONFLICT (content) DO UPDATE "
                "SET id = excluded.id, text = excluded.text, metadata = excluded.metadata",
                passages,
            )
            self._connection.executemany(
                "INSERT OR REPLACE INTO entries VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", entries
            )
            self._extend_shards(record.place for record in records)

    def delete(self, content: str, space: str | None = None) -> int:
        """Forget entries of one space or of all, and the text once it has none; how many went."""
        with self._transaction():
            gone = self._connection.execute(
                "SELECT space, text FROM entries JOIN passages USING (content) "
                "WHERE content = ? AND (? IS NULL OR space = ?)",
                (content, space, space),
            )
            self._discount_windows(gone.fetchall())
            deleted = self._connection.execute(
                "DELETE FROM entries WHERE content = ? AND (? IS NULL OR space = ?)",
                (content, space, space),
            ).rowcount
            self._connection.execute(
                "DELETE FROM passages WHERE content = ? "
                "AND NOT EXISTS (SELECT 1 FROM entries WHERE entries.content = passages.content)",
                (content,),
            )
            self._connection.execute(
                "DELETE FROM vectors WHERE content = ? AND content NOT IN "
                "(SELECT content FROM passages)",
                (content,),
            )
        return deleted

    def move(self, moved: Sequence[tuple[GistKey, Place]], freed: Sequence[int]) -> None:
        """Note new places, and forget the freed shards with whatever entry still lies there."""
        with self._transaction():
            self._connection.executemany(
                "UPDATE entries SET shard = ?, offset = ?, length = ?, checksum = ? "
                "WHERE space = ? AND content = ?",
                [(*_columns(place), key.space, key.content) for key, place in moved],
            )
            self._extend_shards(place for _, place in moved)
            numbers = [(shard,) for shard in freed]
            left = self._connection.execute(
                "SELECT space, text FROM entries JOIN passages USING (content) "
                "WHERE shard IN (SELECT value FROM json_each(?))",
                (json.dumps([*freed]),),
            )
            self._discount_windows(left.fetchall())
            self._connection.executemany("DELETE FROM entries WHERE shard = ?", numbers)
            self._connection.executemany("DELETE FROM shards WHERE shard = ?", numbers)

    def vacuum(self) -> None:
        """Rewrite the file without what was deleted, and empty the write-ahead log."""
        with self._lock, _translated(self.path):
            self._connection.execute("VACUUM")
            busy, _, _ = self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        if busy:
            raise StoreWriteError(
                f"a reader has kept {self.path}-wal in use for {_BUSY_S:.0f} s, so deleted text "
                "may still stand there; compact again"
            )

    def _has_vectors(self) -> bool:
        return bool(self._rows("SELECT 1 FROM sqlite_master WHERE name = 'vectors'"))

    def _meta(self, name: str) -> int:
        rows = self._rows("SELECT value FROM meta WHERE name = ?", (name,))
        if not rows or not isinstance(rows[0][0], int):
            raise _damaged(self.path, f"it states no {name}")
        return rows[0][0]

    def _rows(self, query: str, parameters: Sequence[object] = ()) -> list[tuple[Any, ...]]:
        """All rows at once: an open cursor would hold back the writer's checkpoints."""
        with self._lock, _translated(self.path):
            return self._connection.execute(query, parameters).fetchall()

    def _whole_numbers(self, rows: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
        """The rows, if nothing but integers is in them; SQLite puts up with anything."""
        if all(type(value) is int for row in rows for value in row):
            return rows
        raise _damaged(self.path, "its windows are no numbers")

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """All or nothing, and a new generation."""
        with self._lock, _translated(self.path), self._connection:
            self._connection.execute("BEGIN IMMEDIATE")
            yield
            self._connection.execute("UPDATE meta SET value = value + 1 WHERE name = 'generation'")

    def _count_windows(self, passages: Iterable[tuple[str, str]]) -> None:
        """Index texts in their spaces, once per new entry."""
        self._connection.executemany(
            "INSERT INTO windows (number, lead, length, passages) VALUES (?, ?, ?, 1) "
            "ON CONFLICT (number, lead, length) DO UPDATE SET passages = passages + 1",
            _window_rows(passages),
        )

    def _discount_windows(self, passages: Iterable[tuple[str, str]]) -> None:
        """Undo ``_count_windows`` for entries that go."""
        rows = list(_window_rows(passages))
        which = "number = ? AND lead = ? AND length = ?"
        self._connection.executemany(
            f"UPDATE windows SET passages = passages - 1 WHERE {which}", rows
        )
        self._connection.executemany(f"DELETE FROM windows WHERE {which} AND passages <= 0", rows)

    def _extend_shards(self, places: Iterable[Place]) -> None:
        self._connection.executemany(
            "INSERT INTO shards VALUES (?, ?) "
            "ON CONFLICT (shard) DO UPDATE SET length = max(length, excluded.length)",
            [(place.shard, place.end) for place in places],
        )


def _connect(path: Path, mode: str) -> sqlite3.Connection:
    connection = sqlite3.connect(
        f"{path.absolute().as_uri()}?{mode}",
        uri=True,
        timeout=_BUSY_S,
        isolation_level=None,
        check_same_thread=False,
    )
    connection.text_factory = lambda text: text.decode(errors="replace")
    return connection


def _mode(path: Path) -> str:
    """How to open a manifest that is there.

    Even a reader makes files beside it. Where it may not, as on a read-only mount, and no writer
    has left any, the manifest is taken to be at rest and is read without them.
    """
    if os.access(path.parent, os.W_OK):
        return "mode=rw"
    at_rest = not any(path.with_name(path.name + end).exists() for end in ("-wal", "-shm"))
    return "immutable=1" if at_rest else "mode=ro"


@contextmanager
def _translated(path: Path) -> Iterator[None]:
    """SQLite's errors as ours."""
    try:
        yield
    except sqlite3.ProgrammingError as error:
        raise BadInput(f"the store at {path.parent} cannot be asked this: {error}") from error
    except sqlite3.DatabaseError as error:
        if error.sqlite_errorcode & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            raise _damaged(path, error) from error
        raise StoreWriteError(f"{path}: {error}") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, reason: object) -> CorruptEntry:
    return CorruptEntry(
        f"{path} is damaged ({reason}); delete the store and make it again with gist-rag precompute"
    )


def space_seed(space: str) -> int:
    """What keeps apart the window numbers of spaces."""
    return zlib.crc32(space.encode())


def _window_rows(passages: Iterable[tuple[str, str]]) -> Iterator[tuple[int, int, int]]:
    """Number, lead and length of each text that is long enough to have a window."""
    for space, text in passages:
        window, (lead, length) = place(normalise(text))
        if len(window) == WINDOW:
            yield int(window_numbers(window, [0], space_seed(space))[0]), lead, length


def _columns(place: Place) -> tuple[int, int, int, int]:
    return place.shard, place.offset, place.length, place.checksum


def _metadata(passage: Passage) -> str:
    """Metadata as JSON; what JSON does not know, such as a date, becomes its ``str``."""
    try:
        return json.dumps(dict(passage.metadata), default=str)
    except (TypeError, ValueError) as error:
        raise BadInput(f"the metadata of passage {passage.id!r} is not JSON: {error}") from error


def _passage(content: str, text: str, id: str, metadata: str) -> Passage | None:
    """A passage as it was stored; ``None``, and a warning, when its row has changed since."""
    try:
        passage = Passage(text=text, id=id, metadata=json.loads(metadata))
        if passage.content == content:
            return passage
    except (AttributeError, TypeError, ValueError) as error:
        logger.warning("passage %s is damaged and left out: %s", content, error)
    else:
        logger.warning("passage %s is damaged and left out: its text has changed", content)
    return None
