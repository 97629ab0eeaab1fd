"""Gists on disk and in memory. No room of this floor knows a model or a compressor."""

from gist_rag.store.codec import pack, unpack
from gist_rag.store.store import GistStore, StoreStats

__all__ = ["GistStore", "StoreStats", "pack", "unpack"]
