from __future__ import annotations

from dataclasses import replace

import pytest

from gist_rag.store import pack
from gist_rag.store.shards import Place
from gist_rag.store.tiers import MemoryTier
from gist_rag.types import GistKey, PackedState

PLACE = Place(shard=1, offset=0, length=64, checksum=7)
A, B, C = (GistKey("s", content) for content in "abc")


@pytest.fixture(scope="module")
def packed(make_state) -> PackedState:
    return pack(make_state(), "bf16")


@pytest.fixture
def tier(packed: PackedState) -> MemoryTier:
    """Room for two states, and ``a`` and ``b`` in it."""
    tier = MemoryTier(memory_bytes=2 * packed.num_bytes)
    tier.put(A, PLACE, packed)
    tier.put(B, PLACE, packed)
    return tier


def test_the_state_read_longest_ago_makes_room(tier: MemoryTier, packed: PackedState) -> None:
    tier.get(A, PLACE)
    tier.put(C, PLACE, packed)

    assert [tier.get(key, PLACE) is packed for key in (A, B, C)] == [True, False, True]


def test_bytes_stay_within_the_budget(tier: MemoryTier, packed: PackedState) -> None:
    for key in (A, B, C, A):
        tier.put(key, PLACE, packed)

    assert tier.num_bytes == 2 * packed.num_bytes


def test_a_state_is_given_out_for_its_own_place_only(tier: MemoryTier) -> None:
    assert tier.get(A, replace(PLACE, offset=64)) is None


def test_a_state_above_the_budget_is_not_kept(packed: PackedState) -> None:
    tier = MemoryTier(memory_bytes=packed.num_bytes - 1)
    tier.put(A, PLACE, packed)

    assert tier.get(A, PLACE) is None
    assert tier.num_bytes == 0


def test_a_dropped_state_frees_its_bytes(tier: MemoryTier, packed: PackedState) -> None:
    tier.drop(A)
    tier.drop(A)

    assert tier.get(A, PLACE) is None
    assert tier.num_bytes == packed.num_bytes


def test_hits_and_misses_are_counted(tier: MemoryTier) -> None:
    tier.get(A, PLACE)
    tier.get(C, PLACE)
    tier.get(B, PLACE)

    assert (tier.hits, tier.misses) == (2, 1)
