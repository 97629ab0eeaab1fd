"""FAISS row > content key: vectors whose int64 ids are derived from the passages' content keys.

A hit leads to its gist without a look at any text. On the disk an index is two files::

    index.json           format, dimension, embedder, factory, content keys, checksum
    vectors-<sha>.faiss  what FAISS wrote

The checksum names the FAISS file, and the JSON is replaced last, so that a writer that is killed
leaves the index as it was.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from gist_rag.errors import (
    BadInput,
    CorruptEntry,
    FormatTooNew,
    IndexMismatch,
    MissingExtra,
    StoreWriteError,
)
from gist_rag.retrieval.embed import Vectors

FORMAT = 1
FLAT = "IDMap2,Flat"
"""Exact search."""

_SIDECAR = "index.json"


@dataclass(frozen=True)
class Hit:
    """A passage by its content key, and its inner product with the question."""

    content: str
    score: float


class VectorIndex:
    """Vectors of passages by content key, searched by inner product.

    The first vectors fix the dimension. Searching is safe from several threads, changing is not.

    Args:
        embedder: name of what makes the vectors.
        factory: FAISS factory string of an index that keeps ids, such as ``"IDMap2,Flat"``,
            ``"IVF256,Flat"`` or ``"IDMap2,HNSW32"``. One that needs training is trained on the
            first vectors.

    Raises:
        MissingExtra: faiss is not installed.
        BadInput: a factory string whose ids go wrong when rows are removed.
    """

    def __init__(self, embedder: str = "", factory: str = FLAT) -> None:
        if "IDMap" in factory and "IVF" in factory:
            # IDMap takes it that rows move up when one before them goes; those of IVF do not.
            raise BadInput(f"factory {factory!r}: IVF keeps ids by itself; leave IDMap out")
        self.embedder = embedder
        self.factory = factory
        self._faiss = _import_faiss()
        self._index: Any = None
        self._contents: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self._contents)

    @property
    def contents(self) -> list[str]:
        """Content keys in the order they were added."""
        return list(self._contents.values())

    @property
    def dimension(self) -> int | None:
        """``d``, or ``None`` before the first vectors."""
        return None if self._index is None else int(self._index.d)

    def add(self, contents: Sequence[str], vectors: Vectors) -> int:
        """Add passages, all or none; a content that is there already stays as it is.

        Args:
            contents: content keys.
            vectors: ``(n, d)``, one for each.

        Returns:
            How many were added.

        Raises:
            BadInput: vectors that do not fit, contents whose ids collide, or a factory string that
                FAISS cannot follow.
        """
        vectors = self._checked(vectors)
        if len(vectors) != len(contents):
            raise BadInput(f"{len(contents)} contents with {len(vectors)} vectors")
        fresh: dict[int, str] = {}
        rows = []
        for row, content in enumerate(contents):
            number = faiss_id(content)
            known = self._contents.get(number, fresh.get(number))
            if known is None:
                fresh[number] = content
                rows.append(row)
            elif known != content:
                raise BadInput(f"contents {known} and {content} have the same FAISS id {number}")
        if fresh:
            self._append(np.fromiter(fresh, np.int64), vectors[rows])
            self._contents |= fresh
        return len(fresh)

    def remove(self, contents: Iterable[str]) -> int:
        """Remove passages; those that are not there are ignored.

        Returns:
            How many were removed.

        Raises:
            BadInput: the index cannot forget (HNSW, for example).
        """
        known = {faiss_id(c) for c in contents} & self._contents.keys()
        if known:
            try:
                self._index.remove_ids(np.fromiter(known, np.int64))
            except RuntimeError as error:
                raise BadInput(
                    f"an index {self.factory!r} cannot remove passages; build one with {FLAT!r}"
                ) from error
        for number in known:
            del self._contents[number]
        return len(known)

    def search(self, vectors: Vectors, k: int) -> list[list[Hit]]:
        """The ``k`` nearest passages of each question ``(q, d)``, best first.

        Fewer come back when the index holds fewer, or looks at a part of itself only (IVF).
        """
        if k < 1:
            raise BadInput(f"k is {k}; it must be 1 or more")
        vectors = self._checked(vectors)
        if not self._contents:
            return [[] for _ in vectors]
        scores, ids = self._index.search(vectors, min(k, len(self)))
        return [
            [Hit(self._contents[i], s) for i, s in zip(*row, strict=True) if i >= 0]
            for row in zip(ids.tolist(), scores.tolist(), strict=True)
        ]

    def save(self, folder: Path | str) -> None:
        """Write the index to a folder; who loads meanwhile gets the old one or the new one.

        Raises:
            BadInput: there was never a vector in it.
            StoreWriteError: the folder cannot be written to.
        """
        if self._index is None:
            raise BadInput("an index without vectors cannot be saved; add passages first")
        payload = self._faiss.serialize_index(self._index).tobytes()
        checksum = _checksum(payload, self.contents)
        document = {
            "format": FORMAT,
            "dimension": self.dimension,
            "embedder": self.embedder,
            "factory": self.factory,
            "checksum": checksum,
            "contents": self.contents,
        }
        path = Path(folder)
        current = _vectors(path, checksum)
        try:
            path.mkdir(parents=True, exist_ok=True)
            _write(current, payload)
            _write(path / _SIDECAR, json.dumps(document, indent=0).encode())
            for old in set(path.glob("vectors-*")) - {current}:
                old.unlink()
        except OSError as error:
            raise StoreWriteError(f"cannot write an index to {path}: {error}") from error

    @classmethod
    def load(cls, folder: Path | str) -> Self:
        """Read what ``save`` wrote, checked.

        Raises:
            IndexMismatch: there is no index.
            CorruptEntry: it is damaged, or something else.
            FormatTooNew: a newer gist-rag wrote it.
        """
        path = Path(folder)
        document, payload = _read(path)
        try:
            contents, checksum = document["contents"], document["checksum"]
            index = cls(document["embedder"], document["factory"])
            if _checksum(payload, contents) != checksum:
                raise ValueError("the checksum does not match")
            index._index = index._faiss.deserialize_index(np.frombuffer(payload, np.uint8))
            index._contents = {faiss_id(content): content for content in contents}
            if (index._index.ntotal, index.dimension) != (len(index), document["dimension"]):
                raise ValueError("rows or dimension are not those that index.json names")
        except (LookupError, RuntimeError, TypeError, ValueError) as error:
            raise CorruptEntry(
                f"the index in {path} is damaged ({error}); run gist-rag precompute again"
            ) from error
        return index

    def _checked(self, vectors: Vectors) -> Vectors:
        """Vectors as FAISS takes them."""
        vectors = np.ascontiguousarray(vectors, dtype=np.float32)
        expected = "d" if self._index is None else str(self._index.d)
        if vectors.ndim != 2 or expected not in ("d", str(vectors.shape[1])):
            raise BadInput(f"vectors of shape {vectors.shape}; they must be (n, {expected})")
        if not np.isfinite(vectors).all():
            raise BadInput("a vector holds NaN or infinity; look at the texts it was made of")
        return vectors

    def _append(self, ids: Any, vectors: Vectors) -> None:
        """Add rows, in an index that is made on the first call."""
        faiss, index = self._faiss, self._index
        try:
            if index is None:
                metric = faiss.METRIC_INNER_PRODUCT
                index = faiss.index_factory(vectors.shape[1], self.factory, metric)
            if not index.is_trained:
                index.train(vectors)
            index.add_with_ids(vectors, ids)
        except RuntimeError as error:
            raise BadInput(
                f"FAISS cannot make an index {self.factory!r} of {len(ids)} vectors that keeps "
                f"ids: {error}"
            ) from error
        self._index = index


def faiss_id(content: str) -> int:
    """The first 63 bits of a content key, as FAISS wants int64 ids above 0."""
    try:
        return int(content[:16], 16) >> 1
    except ValueError:
        raise BadInput(f"{content!r} is no content key (a sha256 in hex)") from None


def _import_faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise MissingExtra("faiss-cpu", "faiss") from error
    return faiss


def _vectors(folder: Path, checksum: str) -> Path:
    return folder / f"vectors-{checksum[:16]}.faiss"


def _checksum(payload: bytes, contents: Sequence[str]) -> str:
    """sha256 over vectors and content keys, so that neither changes without the other."""
    digest = hashlib.sha256(payload)
    digest.update("\n".join(contents).encode())
    return digest.hexdigest()


def _write(path: Path, payload: bytes) -> None:
    """Write a file under another name and rename it once the disk has it."""
    scratch = path.with_name(path.name + ".tmp")
    with scratch.open("wb") as file:
        file.write(payload)
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)


def _read(folder: Path) -> tuple[dict[str, Any], bytes]:
    """The JSON and the FAISS file it names, which a writer may take away in between."""
    document = _read_sidecar(folder)
    while True:
        try:
            return document, _vectors(folder, document["checksum"]).read_bytes()
        except OSError as error:
            before, document = document, _read_sidecar(folder)
            if document == before:
                raise CorruptEntry(
                    f"the vectors of {folder} are gone ({error}); run gist-rag precompute again"
                ) from error


def _read_sidecar(folder: Path) -> dict[str, Any]:
    path = folder / _SIDECAR
    try:
        document: dict[str, Any] = json.loads(path.read_text())
        newer = document["format"] > FORMAT
        document["checksum"][:16]
    except FileNotFoundError:
        raise IndexMismatch(
            f"there is no index in {folder}; run gist-rag precompute again"
        ) from None
    except (OSError, LookupError, TypeError, ValueError) as error:
        raise CorruptEntry(
            f"{path} is damaged, or no index of gist-rag ({error}); run gist-rag precompute again"
        ) from error
    if newer:
        raise FormatTooNew(
            f"the index in {folder} has format {document['format']}, but this gist-rag reads "
            f"formats up to {FORMAT}; upgrade gist-rag"
        )
    return document
