"""Tokens > text as they arrive: whole characters only, cut at stop strings."""

from __future__ import annotations

from collections.abc import Callable, Sequence


class TextStream:
    """Turns one answer's tokens into pieces of text.

    A piece is held back while it may still be the beginning of a stop string or half of a
    character; ``finish`` hands out the rest.

    Args:
        decode: token ids > text.
        stop: strings that end the answer; they are not part of it.
    """

    def __init__(self, decode: Callable[[list[int]], str], stop: Sequence[str]) -> None:
        self._decode = decode
        self._stop = tuple(stop)
        self._tokens: list[int] = []
        self._context = 0  # decoding starts here, so that word starts keep their meaning
        self._decoded = 0  # tokens whose text is in self._text
        self._text = ""
        self._given = 0
        self.stopped = False

    @property
    def text(self) -> str:
        """All text handed out so far."""
        return self._text[: self._given]

    def push(self, token: int) -> str:
        """The text that a new token makes certain."""
        self._tokens.append(token)
        fresh = self._pending()
        if fresh.endswith("\ufffd"):
            return ""
        self._text += fresh
        self._context, self._decoded = self._decoded, len(self._tokens)
        return self._release(final=False)

    def finish(self) -> str:
        """What was held back, once no more tokens come."""
        if self.stopped:
            return ""
        self._text += self._pending()
        self._decoded = len(self._tokens)
        return self._release(final=True)

    def _pending(self) -> str:
        known = self._decode(self._tokens[self._context : self._decoded])
        return self._decode(self._tokens[self._context :])[len(known) :]

    def _release(self, *, final: bool) -> str:
        end = len(self._text)
        cuts = [at for s in self._stop if (at := self._text.find(s, self._begin(s))) >= 0]
        if cuts:
            end, self.stopped = min(cuts), True
        elif not final:
            end -= self._held()
        piece = self._text[self._given : end]
        self._given = max(self._given, end)
        return piece

    def _begin(self, stop: str) -> int:
        return max(0, self._given - len(stop))

    def _held(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        longest = 0
        for stop in self._stop:
            for size in range(min(len(stop) - 1, len(self._text)), longest, -1):
                if self._text.endswith(stop[:size]):
                    longest = size
                    break
        return longest
