"""What users choose by a word. Imports nothing: adapters name it before torch is there."""

from __future__ import annotations

from typing import Literal, TypeAlias

GistMode: TypeAlias = Literal["auto", "off", "require", "text"]
"""``auto``: read known passages as gists; ``off``: read everything as text; ``require``: raise
``GistsRequired`` when no passage of the prompt has a gist; ``text``: read the words of gists that
have some, see ``GistEngine.in_words``."""

OnMiss: TypeAlias = Literal["ignore", "background", "inline"]
"""What happens with a passage without a gist. ``ignore``: read it as text; ``background``: as text
now and compress it meanwhile; ``inline``: compress it first."""

NAMES_ENGINE = (
    "model_name",
    "store",
    "compressor",
    "ratio",
    "settings",
    "codec",
    "namespace",
    "reader",
    "judge",
    "focus",
    "apart",
    "expand",
    "budget",
    "dtype",
    "device",
)
"""Fields of an adapter that say which engine reads: what ``GistEngine.from_pretrained`` takes, its
``model`` first."""
