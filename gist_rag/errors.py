"""Every error that gist-rag raises on purpose.

    GistRagError
    ├── BadInput (ValueError)        what the caller gave cannot be used
    │   ├── ContextOverflow          prompt, gists and answer do not fit the model's window
    │   ├── PassageTooLong           one passage does not fit the model's window
    │   └── UnknownCompressor        no compressor of that name, or a folder that holds none
    ├── CorruptEntry                 stored bytes do not match their checksum or their header
    ├── FormatTooNew                 written by a newer gist-rag than this one
    ├── GistsRequired                gist_mode="require", but no passage of the prompt has a gist
    ├── IndexMismatch                the FAISS index and the store do not hold the same passages
    ├── MissingExtra (ImportError)   an optional package is not installed
    ├── ModelNotFound                no such model id, folder or alias
    ├── NotANumber                   the loss of a training run is infinite or NaN
    ├── SpaceMismatch                the store was made with another model, compressor or codec
    ├── StoreLocked                  another process is writing to the store
    ├── StoreWriteError              no permission, no space, not a store folder
    └── UnsupportedBackbone          the model's attention cannot read gists; the message says why
        └── GateFailed               it should, but uncompressed gists do not equal plain prefill

A message says what was given, what was expected and what to do.
"""

from __future__ import annotations


class GistRagError(Exception):
    """Root of all errors raised on purpose by gist-rag."""


class BadInput(GistRagError, ValueError):
    """What the caller gave cannot be used."""


class ContextOverflow(BadInput):
    """Prompt, gists and answer together need more positions than the model has."""


class PassageTooLong(BadInput):
    """One passage does not fit the model's window."""


class UnknownCompressor(BadInput):
    """No compressor of that name, or a folder that holds none."""


class CorruptEntry(GistRagError):
    """Stored bytes do not match their checksum or their header."""


class FormatTooNew(GistRagError):
    """Written by a newer gist-rag than this one."""


class GistsRequired(GistRagError):
    """``gist_mode="require"``, but no passage of the prompt has a gist."""


class IndexMismatch(GistRagError):
    """The FAISS index and the store do not hold the same passages."""


class MissingExtra(GistRagError, ImportError):
    """An optional package is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed; run: pip install 'gist-rag[{extra}]'")


class ModelNotFound(GistRagError):
    """No such model id, folder or alias."""


class NotANumber(GistRagError):
    """The loss of a training run is infinite or NaN."""


class SpaceMismatch(GistRagError):
    """The store was made with another model, compressor or codec."""


class StoreLocked(GistRagError):
    """Another process is writing to the store."""


class StoreWriteError(GistRagError):
    """No permission, no space left, or not a store folder."""


class UnsupportedBackbone(GistRagError):
    """The model's attention cannot read gists; the message says why."""


class GateFailed(UnsupportedBackbone):
    """Uncompressed gists do not give the logits of plain prefill on this model."""
