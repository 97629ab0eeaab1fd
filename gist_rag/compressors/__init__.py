"""Compressors: passage > ``GistState``. One file per method under ``base.Compressor``."""

from gist_rag.compressors.base import Compressor, CompressorConfig
from gist_rag.compressors.registry import COMPRESSORS, DEFAULT_COMPRESSOR, make_compressor

__all__ = ["COMPRESSORS", "DEFAULT_COMPRESSOR", "Compressor", "CompressorConfig", "make_compressor"]
