"""Small states, passages and processes for the tests of the store."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

from gist_rag.store import GistStore, pack
from gist_rag.types import GistState, PackedState, Passage

MakeState = Callable[..., GistState]
MakeItem = Callable[[int], tuple[Passage, PackedState]]
Fork = Callable[[Callable[[], None]], BaseProcess]


@pytest.fixture(scope="session")
def make_state() -> MakeState:
    def make(
        seed: int = 0,
        lengths: Sequence[int] = (3, 0, 5, 1),
        num_layers: int = 2,
        size: int = 8,
        text: str | None = None,
    ) -> GistState:
        """A random state whose row ``i`` has ``lengths[i]`` slots."""
        generator = torch.Generator().manual_seed(seed)
        slots = sum(lengths)
        return GistState(
            keys=torch.randn(slots, size, generator=generator),
            values=torch.randn(slots, size, generator=generator),
            bias=torch.randn(slots, generator=generator),
            offsets=torch.randint(0, 40, (slots,), generator=generator, dtype=torch.int32),
            rows=torch.tensor([0, *lengths]).cumsum(0).int(),
            num_layers=num_layers,
            span=40,
            num_tokens=40,
            text=text,
        )

    return make


@pytest.fixture(scope="session")
def make_item(make_state: MakeState) -> MakeItem:
    def make(number: int) -> tuple[Passage, PackedState]:
        """Passage ``number`` and its packed state; equal numbers give equal items."""
        passage = Passage(f"This is passage number {number}.", id=f"doc-{number}")
        return passage, pack(make_state(number, size=64), ("bf16", "int8")[number % 2])

    return make


@pytest.fixture
def store(tmp_path: Path) -> Iterator[GistStore]:
    """An empty store that knows the space ``s``."""
    with GistStore.open(tmp_path / "store") as store:
        store.add_space("s", {"codec": "bf16"})
        yield store


@pytest.fixture
def fork() -> Iterator[Fork]:
    """Run a function in another process; those still running are killed at the end."""
    processes: list[BaseProcess] = []

    def start(function: Callable[[], None]) -> BaseProcess:
        process = multiprocessing.get_context("fork").Process(target=function)
        process.start()
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.join()


@pytest.fixture
def as_nobody(fork: Fork) -> Callable[[Callable[[], None]], None]:
    """Run a function in a process that file permissions bind, whoever runs the tests."""

    def run(function: Callable[[], None]) -> None:
        def without_rights() -> None:
            if os.getuid() == 0:
                os.setuid(65534)
            function()

        process = fork(without_rights)
        process.join()
        assert process.exitcode == 0

    return run


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user may enter; ``tmp_path`` lets in its owner only."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)
