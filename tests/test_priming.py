"""Passages that turn up without a gist: ignored, compressed on the spot, or meanwhile."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from typing import Any

import pytest

from gist_rag.engine import GistEngine
from gist_rag.errors import BadInput, PassageTooLong, StoreLocked
from gist_rag.priming import Primer
from gist_rag.types import Passage


class Shelf:
    """Keeps passages; refuses what it is told to."""

    def __init__(self) -> None:
        self.kept: set[str] = set()
        self.calls = 0
        self.refuse: dict[str, Exception] = {}
        self.open = threading.Event()
        self.open.set()

    def missing(self, passages: Sequence[Passage]) -> list[Passage]:
        return [p for p in passages if p.content not in self.kept]

    def compress(self, passages: Sequence[Passage]) -> None:
        self.open.wait(5)
        self.calls += 1
        for passage in passages:
            if passage.text in self.refuse:
                raise self.refuse[passage.text]
        self.kept |= {p.content for p in passages}


@pytest.fixture
def shelf() -> Shelf:
    return Shelf()


def some(*texts: str) -> list[Passage]:
    return [Passage(text) for text in texts]


def primer(shelf: Shelf, **options: Any) -> Primer:
    return Primer(shelf.missing, shelf.compress, **options)


def test_ignoring_does_nothing(shelf: Shelf) -> None:
    primer(shelf).prime(some("a"), "ignore")
    assert shelf.calls == 0


def test_inline_is_done_when_it_returns(shelf: Shelf) -> None:
    primer(shelf).prime(some("a", "b"), "inline")
    assert len(shelf.kept) == 2


def test_background_returns_at_once(shelf: Shelf) -> None:
    shelf.open.clear()
    background = primer(shelf)
    background.prime(some("a", "b"), "background")
    assert not shelf.kept
    assert not background.wait(0.01)
    shelf.open.set()
    assert background.wait(5)
    assert len(shelf.kept) == 2
    background.close()


def test_a_passage_waits_once(shelf: Shelf) -> None:
    shelf.open.clear()
    background = primer(shelf)
    for _ in range(3):
        background.prime(some("a"), "background")
        background.prime(some("b"), "background")
    shelf.open.set()
    assert background.wait(5)
    assert shelf.calls <= 3
    background.close()


def test_the_queue_has_an_end(shelf: Shelf, caplog: pytest.LogCaptureFixture) -> None:
    shelf.open.clear()
    background = primer(shelf, limit=2)
    with caplog.at_level(logging.WARNING):
        for i in range(20):
            background.prime(some(str(i)), "background")
    shelf.open.set()
    assert background.wait(5)
    assert len(shelf.kept) <= 2 + 8
    assert caplog.text.count("no more now") == 1
    background.close()


@pytest.mark.parametrize("on_miss", ["inline", "background"])
def test_an_error_is_logged_once_and_spoils_nothing(
    shelf: Shelf, caplog: pytest.LogCaptureFixture, on_miss: Any
) -> None:
    shelf.refuse = {"long": PassageTooLong("too long"), "longer": PassageTooLong("too long")}
    both = primer(shelf)
    with caplog.at_level(logging.WARNING):
        both.prime(some("a", "long", "longer", "b"), on_miss)
        both.wait(5)
        calls = shelf.calls
        both.prime(some("long"), on_miss)
        both.wait(5)
    assert shelf.kept == {p.content for p in some("a", "b")}
    assert caplog.text.count("too long") == 1
    assert shelf.calls == calls  # what was refused for good is not tried again
    both.close()


def test_a_locked_store_is_tried_again(shelf: Shelf) -> None:
    shelf.refuse = {"a": StoreLocked("busy")}
    inline = primer(shelf)
    inline.prime(some("a"), "inline")
    shelf.refuse = {}
    inline.prime(some("a"), "inline")
    assert len(shelf.kept) == 1


def test_a_crash_does_not_end_the_thread(shelf: Shelf) -> None:
    shelf.refuse = {"a": RuntimeError("crash")}
    background = primer(shelf)
    background.prime(some("a"), "background")
    assert background.wait(5)
    background.prime(some("b"), "background")
    assert background.wait(5)
    assert shelf.kept == {Passage("b").content}
    background.close()


def test_no_error_reaches_the_question(
    shelf: Shelf, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Out of memory while compressing, or a store whose disk is gone."""
    shelf.refuse = {"a": RuntimeError("out of memory")}
    inline = primer(shelf)
    with caplog.at_level(logging.WARNING):
        inline.prime(some("a"), "inline")
        inline.prime(some("a"), "inline")
        monkeypatch.setattr(inline, "_missing", lambda _: (_ for _ in ()).throw(OSError("gone")))
        inline.prime(some("b"), "inline")
        inline.prime(some("b"), "background")
    assert shelf.kept == set()
    assert [caplog.text.count(what) for what in ("out of memory", "gone")] == [1, 1]


def test_closing_leaves_the_rest_undone(shelf: Shelf) -> None:
    background = primer(shelf)
    shelf.open.clear()
    background.prime(some(*map(str, range(30))), "background")
    threading.Timer(0.05, shelf.open.set).start()
    background.close()
    assert len(shelf.kept) <= 8
    background.prime(some("late"), "background")
    assert Passage("late").content not in shelf.kept


def test_an_unknown_policy_is_refused(shelf: Shelf) -> None:
    with pytest.raises(BadInput, match="on_miss is 'later'"):
        primer(shelf).prime(some("a"), "later")  # type: ignore[arg-type]


# ---- the engine


@pytest.mark.parametrize("on_miss", ["ignore", "background", "inline"])
def test_an_engine_reads_a_primed_passage_as_gist(
    make_engine: Any, passages: list[Passage], on_miss: Any
) -> None:
    engine: GistEngine = make_engine(settings={"ratio": 4})
    prompt = f"{passages[0].text}\n\nWhat is this?"
    engine.prime(passages[:2], on_miss)
    assert engine.wait_for_priming(30)
    assert engine.generate(prompt).stats.hits == (on_miss != "ignore")


def test_a_passage_too_long_for_the_model_stays_text(
    make_engine: Any, passages: list[Passage]
) -> None:
    engine: GistEngine = make_engine(settings={"ratio": 4})
    engine.prime([Passage("word " * 9000), passages[0]])
    assert set(engine.store.contents(engine.space)) == {passages[0].content}
