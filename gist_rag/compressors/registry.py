"""Names > compressors. The only file that a new method touches besides its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gist_rag.backbone import Backbone
from gist_rag.compressors.attention_matching import AttentionMatching
from gist_rag.compressors.autoencoding import Autoencoding
from gist_rag.compressors.base import Compressor, make_config, read_document
from gist_rag.compressors.full import Full
from gist_rag.compressors.gist_coco import GistCoco
from gist_rag.compressors.gist_pool import GistPool
from gist_rag.compressors.gisting import Gisting
from gist_rag.compressors.incomes import InComeS
from gist_rag.compressors.light_thinker import LightThinker
from gist_rag.compressors.pooled import MeanPooled, Strided
from gist_rag.compressors.sentence_anchored import SentenceAnchored
from gist_rag.compressors.trim_kv import TrimKV
from gist_rag.compressors.unigist import UniGist
from gist_rag.errors import BadInput, UnknownCompressor

COMPRESSORS: dict[str, type[Compressor]] = {
    method.name: method
    for method in (
        AttentionMatching,
        Autoencoding,
        Full,
        GistCoco,
        GistPool,
        Gisting,
        InComeS,
        LightThinker,
        MeanPooled,
        SentenceAnchored,
        Strided,
        TrimKV,
        UniGist,
    )
}
DEFAULT_COMPRESSOR = AttentionMatching.name
SHIPPED = Path(__file__).parents[1] / "data" / "compressors"
"""Trained states of the embedded model, a folder for each; its name is how users ask for it."""


def make_compressor(
    name: str | Path, backbone: Backbone, settings: Mapping[str, Any] | None = None
) -> Compressor:
    """A compressor by method name, by the name of a trained one that ships, or from a folder that
    ``save_pretrained`` wrote.

    Args:
        settings: config fields by name; of trained ones, which bring their own, only ``ratio`` and
            ``coarser``.

    Raises:
        UnknownCompressor: none of these.
        BadInput: a setting that the method does not have, or a value it refuses.
    """
    given = dict(settings or {})
    if method := COMPRESSORS.get(str(name)):
        return method(backbone, make_config(method, given))
    ships = str(name) in shipped()
    folder = SHIPPED / name if ships else Path(name)
    if not folder.is_dir():
        raise UnknownCompressor(
            f"{str(name)!r} is neither a method ({', '.join(sorted(COMPRESSORS))}) nor a trained "
            f"one that ships ({', '.join(shipped())}) nor a folder"
        )
    method_name = str(read_document(folder)["name"])
    if method_name not in COMPRESSORS:
        raise UnknownCompressor(f"{name} holds {method_name!r}, which this gist-rag does not know")
    own = ("ratio", "coarser")
    ratios: dict[str, Any] = {name: given.pop(name) for name in own if name in given}
    if given:
        raise BadInput(f"{name} brings its own settings; leave out {', '.join(given)}")
    compressor = COMPRESSORS[method_name].from_pretrained(folder, backbone)
    if ships:
        compressor.folder = str(name)
    if ratios:
        compressor.configure(ratios)
    return compressor


def shipped() -> list[str]:
    """Names of the trained compressors that ship."""
    return sorted(path.name for path in SHIPPED.glob("*") if path.is_dir())
