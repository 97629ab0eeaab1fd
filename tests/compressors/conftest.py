"""What the tests of single methods share."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gist_rag.backbone import Backbone
from gist_rag.compressors import Compressor
from gist_rag.layout import Layout


@pytest.fixture
def drawn() -> Callable[[Layout], str]:
    """A mask as the docstrings of methods draw it: one line per slot, ``x`` where it sees."""

    def draw(layout: Layout) -> str:
        rows = ["".join("x" if seen else "." for seen in row) for row in layout.mask().tolist()]
        return "\n".join(row[: i + 1] for i, row in enumerate(rows))

    return draw


@pytest.fixture
def taught() -> Callable[[Compressor], Compressor]:
    """Gives a method weights that change what it computes, as training would."""

    def teach(compressor: Compressor) -> Compressor:
        torch.manual_seed(1)
        for name, weight in compressor.named_parameters():
            if name.startswith("lora.up"):
                torch.nn.init.normal_(weight, std=0.05)
        return compressor

    return teach


@pytest.fixture
def ids(backbone: Backbone) -> Tensor:
    """A passage of 48 tokens."""
    text = (
        "A reader needs pages. It looks at the WAL first! Is there a copy? Then it reads that "
        "one; otherwise the page is read from the database file itself, as it always was."
    )
    found = backbone.tokenize(text)
    assert len(found) >= 48
    return found[:48]


@pytest.fixture
def unchanged(ids: Tensor) -> Callable[[Compressor, list[int]], list[int]]:
    """Which gists stay bit-identical when passage tokens are exchanged."""

    @torch.no_grad()
    def compare(compressor: Compressor, tokens: list[int]) -> list[int]:
        other = ids.clone()
        other[tokens] = (other[tokens] + 7) % 500 + 3
        layout = compressor.layout(ids)
        gists = layout.is_gist.nonzero()[:, 0]
        ours, theirs = (compressor.encode([i], [layout])[:, 0, gists] for i in (ids, other))
        same = (ours == theirs).all(-1).all(0)
        return [i for i, equal in enumerate(same.tolist()) if equal]

    return compare


@pytest.fixture
def lowers() -> Callable[[Compressor, Callable[[], Tensor]], bool]:
    """Whether a dozen steps lower a loss by a fifth."""

    def train(compressor: Compressor, loss: Callable[[], Tensor]) -> bool:
        optimiser = torch.optim.Adam(compressor.parameters(), lr=1e-2)
        losses = []
        for _ in range(12):
            now = loss()
            optimiser.zero_grad()
            now.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            losses.append(float(now.detach()))
        return losses[-1] < 0.8 * losses[0]

    return train
