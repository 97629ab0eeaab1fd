"""Names > compressors. The only file that a new method touches besides its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from gist_rag.backbone import Backbone
from gist_rag.compressors.attention_matching import AttentionMatching
from gist_rag.compressors.autoencoding import Autoencoding
from gist_rag.compressors.base import Compressor, read_document
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


def make_compressor(
    name: str | Path, backbone: Backbone, settings: Mapping[str, Any] | None = None
) -> Compressor:
    """A compressor by method name or from a folder that ``save_pretrained`` wrote.

    Args:
        settings: config fields by name; not for folders, which bring their own.

    Raises:
        UnknownCompressor: neither a method nor such a folder.
        BadInput: a setting that the method does not have, or a value it refuses.
    """
    if method := COMPRESSORS.get(str(name)):
        try:
            config = method.Config.model_validate(dict(settings or {}))
        except ValidationError as error:
            faults = "; ".join(
                f"{'.'.join(map(str, e['loc']))}: {e['msg']} (given: {e['input']!r})"
                for e in error.errors()
            )
            raise BadInput(f"settings of {method.name}: {faults}") from error
        return method(backbone, config)
    if not Path(name).is_dir():
        raise UnknownCompressor(
            f"{str(name)!r} is neither a method ({', '.join(sorted(COMPRESSORS))}) nor a folder"
        )
    method_name = str(read_document(name)["name"])
    if method_name not in COMPRESSORS:
        raise UnknownCompressor(f"{name} holds {method_name!r}, which this gist-rag does not know")
    if settings:
        raise BadInput(f"{name} brings its own settings; leave out {', '.join(settings)}")
    return COMPRESSORS[method_name].from_pretrained(name, backbone)
