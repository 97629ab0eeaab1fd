"""Streaming text: whole characters, exact stops, nothing lost."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from gist_rag.detokenize import TextStream


def decode_bytes(tokens: list[int]) -> str:
    """One token per byte, as the worst byte-level tokenizer would have it."""
    return bytes(tokens).decode(errors="replace")


def stream(text: str, stop: Sequence[str] = ()) -> tuple[list[str], TextStream]:
    out = TextStream(decode_bytes, stop)
    pieces = []
    for token in text.encode():
        pieces.append(out.push(token))
        if out.stopped:
            break
    return [*pieces, out.finish()], out


@given(st.text())
def test_pieces_join_to_the_text(text: str) -> None:
    pieces, out = stream(text)
    assert "".join(pieces) == out.text == text


@given(
    st.text(alphabet="abc", max_size=40),
    st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=3),
)
def test_text_ends_before_the_first_stop_string(text: str, stop: list[str]) -> None:
    cuts = [text.find(s) for s in stop if s in text]
    pieces, out = stream(text, stop)
    # Tokens arrive one by one: the stop string that is complete first wins.
    ends = sorted((text.find(s) + len(s), text.find(s)) for s in stop if s in text)
    first = [at for end, at in ends if end == ends[0][0]] if ends else []
    assert out.text == (text[: min(first)] if cuts else text)
    assert "".join(pieces) == out.text


def test_no_piece_holds_half_a_character() -> None:
    pieces, _ = stream("naïve 文書 🙂")
    assert not any("\ufffd" in piece for piece in pieces)


def test_word_starts_keep_their_spaces(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "The rollback journal is deleted.\nThen the WAL file grows."
    out = TextStream(lambda ids: tokenizer.decode(ids), ())
    pieces = [out.push(i) for i in tokenizer(text).input_ids]
    assert "".join(pieces) + out.finish() == text


@pytest.mark.parametrize("stop", ["\n\n", "journal", "."])
def test_stop_inside_a_token_cuts_there(tokenizer: PreTrainedTokenizerFast, stop: str) -> None:
    text = "The rollback journal is deleted.\n\nThen nothing."
    out = TextStream(lambda ids: tokenizer.decode(ids), [stop])
    for i in tokenizer(text).input_ids:
        out.push(i)
        if out.stopped:
            break
    assert out.text == text[: text.find(stop)]
