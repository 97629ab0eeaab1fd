from __future__ import annotations

from pathlib import Path

import pytest

from gist_rag.errors import CorruptEntry
from gist_rag.store.shards import Place, Shards

BLOBS = [(f"label {i}", bytes([i]) * 40) for i in range(1, 6)]


@pytest.fixture
def shards(tmp_path: Path) -> Shards:
    return Shards(tmp_path / "shards", shard_bytes=100)


def lengths(places: list[Place]) -> dict[int, int]:
    return {place.shard: place.end for place in places}


def test_blobs_come_back_from_their_places(shards: Shards) -> None:
    places = shards.append(BLOBS, {}, 1)

    for place, (label, blob) in zip(places, BLOBS, strict=True):
        assert bytes(shards.read(place, label)) == blob


def test_a_full_shard_is_followed_by_a_new_one(shards: Shards) -> None:
    places = shards.append(BLOBS, {}, 1)

    assert [(place.shard, place.offset) for place in places] == [
        (1, 0),
        (1, 40),
        (2, 0),
        (2, 40),
        (3, 0),
    ]


def test_a_blob_larger_than_a_shard_gets_one_of_its_own(shards: Shards) -> None:
    places = shards.append([("a", b"a" * 10), ("b", b"b" * 500), ("c", b"c" * 10)], {}, 1)

    assert [place.shard for place in places] == [1, 2, 3]


def test_batches_fill_shards_as_one_batch_would(shards: Shards, tmp_path: Path) -> None:
    shards.append(BLOBS, {}, 1)
    other = Shards(tmp_path / "other", shard_bytes=100)
    first = other.append(BLOBS[:3], {}, 1)
    other.append(BLOBS[3:], lengths(first), 3)

    assert [p.read_bytes() for p in sorted(other.folder.iterdir())] == [
        p.read_bytes() for p in sorted(shards.folder.iterdir())
    ]


def test_what_was_not_committed_is_cut_off(shards: Shards) -> None:
    committed = lengths(shards.append(BLOBS[:1], {}, 1))
    shards.append(BLOBS[1:], committed, 2)

    shards.recover(committed)

    assert [p.name for p in shards.folder.iterdir()] == ["000001.gist"]
    assert (shards.folder / "000001.gist").read_bytes() == BLOBS[0][1]


def test_a_read_sees_what_was_appended_after_an_earlier_read(shards: Shards) -> None:
    first = shards.append(BLOBS[:1], {}, 1)
    shards.read(first[0], "label 1")
    second = shards.append(BLOBS[1:2], lengths(first), 2)

    assert bytes(shards.read(second[0], "label 2")) == BLOBS[1][1]


def test_bytes_stay_as_they_were_read_when_their_file_is_cut(shards: Shards) -> None:
    (place,) = shards.append(BLOBS[:1], {}, 1)
    blob = shards.read(place, "label 1")
    (shards.folder / "000001.gist").write_bytes(b"")

    assert bytes(blob) == BLOBS[0][1]


def test_a_blob_is_not_taken_for_another(shards: Shards) -> None:
    (place,) = shards.append(BLOBS[:1], {}, 1)

    with pytest.raises(CorruptEntry, match="have changed"):
        shards.read(place, "label 2")


@pytest.mark.parametrize(
    "place",
    [
        Place(1, 0, 40, 0),
        Place(1, 0, 41, 0),
        Place(1, 2**60, 2**60, 0),
        Place(1, 50, -20, 0),
        Place(1, -20, 40, 0),
        Place(9, 0, 40, 0),
    ],
    ids=["wrong checksum", "too long", "absurd", "negative length", "before", "no such shard"],
)
def test_a_place_that_does_not_hold_its_blob_is_corrupt(shards: Shards, place: Place) -> None:
    shards.append(BLOBS[:1], {}, 1)

    with pytest.raises(CorruptEntry):
        shards.read(place, "label 1")
