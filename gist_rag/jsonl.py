"""Lines of text files, plain or gzipped: what corpora, questions and traces are kept in."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path

from gist_rag.errors import BadInput


def read_lines(path: Path | str, encoding: str = "utf8") -> Iterator[tuple[str, str]]:
    """Each line of a file with the place where it stands, for messages.

    Raises:
        BadInput: the file cannot be read, from the start or on the way.
    """
    path = Path(path)
    opened = gzip.open if path.suffix == ".gz" else open
    number = 0
    try:
        with opened(path, "rt", encoding=encoding) as file:
            for number, line in enumerate(file, start=1):
                yield f"{path}, line {number}", line
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise BadInput(f"cannot read {path} after line {number}: {error}") from error
