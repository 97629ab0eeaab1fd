"""The engine: what users get, on a tiny model with a real store."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from gist_rag.attention import attend
from gist_rag.backbone import Backbone
from gist_rag.compressors import make_compressor
from gist_rag.engine import GistEngine, Request
from gist_rag.errors import (
    BadInput,
    ContextOverflow,
    GateFailed,
    GistsRequired,
    PassageTooLong,
    StoreLocked,
    UnsupportedBackbone,
)
from gist_rag.prompt import Known, Text, rag_messages
from gist_rag.store import GistStore
from gist_rag.types import GistKey, Passage, Sampling

SHORT = Sampling(max_tokens=8)
MakeEngine = Callable[..., GistEngine]


def ask(passages: list[Passage], question: str = "What is WAL?") -> list[Any]:
    return rag_messages(question, [p.text for p in passages])


# ---- reading


def test_known_passages_are_read_as_gists(tiny_engine: GistEngine, passages: list[Passage]) -> None:
    answer = tiny_engine.generate(ask(passages[:3]), SHORT)
    assert [p.id for p in answer.passages] == [p.id for p in passages[:3]]
    assert (answer.stats.hits, answer.stats.misses) == (3, 0)
    assert answer.stats.kernels == ("triton" if torch.cuda.is_available() else "reference")
    assert answer.stats.ratio == pytest.approx(4, rel=0.05)


def test_no_passage_text_is_left_in_the_text(
    tiny_engine: GistEngine, passages: list[Passage]
) -> None:
    segments = tiny_engine.segments(ask(passages[:3]))
    assert [s.content for s in segments if isinstance(s, Known)] == [
        p.content for p in passages[:3]
    ]
    rest = "".join(s.text for s in segments if isinstance(s, Text))
    assert not any(word in rest for p in passages[:3] for word in p.text.split() if len(word) > 9)


def test_unknown_passages_are_read_as_text(
    tiny_engine: GistEngine, passages: list[Passage]
) -> None:
    prompt = ask([passages[0], passages[20]])
    answer = tiny_engine.generate(prompt, SHORT)
    assert [p.id for p in answer.passages] == [passages[0].id]


@pytest.mark.parametrize("known", [True, False], ids=["known", "unknown"])
def test_gists_off_is_plain_transformers(
    tiny_engine: GistEngine, passages: list[Passage], known: bool
) -> None:
    prompt = ask(passages[:2] if known else passages[20:22])
    backbone = tiny_engine.backbone
    ids = backbone.tokenize(backbone.render(prompt))[None]
    plain = backbone.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False
    )
    expected = backbone.tokenizer.decode(plain[0, ids.shape[1] :], skip_special_tokens=True)
    answer = tiny_engine.generate(prompt, SHORT, gist_mode="off" if known else "auto")
    assert answer.text == expected


def test_an_uncompressed_gist_answers_as_its_text_does(
    make_engine: MakeEngine, passages: list[Passage]
) -> None:
    """One passage at the very start of a prompt: nothing is approximated."""
    engine = make_engine("full")
    engine.precompute(passages[:1])
    prompt = passages[0].text + "\n\nWhat is WAL?"
    answers = [engine.generate(prompt, SHORT, gist_mode=m).text for m in ("require", "off")]
    assert answers[0] == answers[1]


def test_a_batch_equals_one_by_one(tiny_engine: GistEngine, passages: list[Passage]) -> None:
    prompts = [ask(passages[:3]), ask(passages[4:5], "Why?"), "No passage here", ask([])]
    together = [a.text for a in tiny_engine.batch(prompts, SHORT)]
    assert together == [tiny_engine.generate(p, SHORT).text for p in prompts]


def test_rows_of_a_batch_keep_their_own_limits(
    tiny_engine: GistEngine, passages: list[Passage]
) -> None:
    limits = [Sampling(max_tokens=n) for n in (3, 9)]
    answers = tiny_engine.batch([ask(passages[:1]), ask(passages[1:2])], limits)
    assert [a.num_tokens for a in answers] == [3, 9]


def test_streamed_pieces_join_to_the_answer(
    tiny_engine: GistEngine, passages: list[Passage]
) -> None:
    chunks = list(tiny_engine.stream(ask(passages[:2]), SHORT))
    assert chunks[-1].answer is not None
    assert all(c.answer is None for c in chunks[:-1])
    assert "".join(c.text for c in chunks) == chunks[-1].answer.text
    assert chunks[-1].answer.text == tiny_engine.generate(ask(passages[:2]), SHORT).text


def test_labels_between_passages_are_read_in_place(
    tiny_engine: GistEngine, passages: list[Passage]
) -> None:
    prompt = f"[1] {passages[0].text}\n[2] {passages[1].text}\nWhich one is about WAL?"
    answer = tiny_engine.generate(prompt, SHORT)
    assert answer.stats.hits == 2


def test_a_prompt_that_ends_with_a_passage_still_answers(
    tiny_engine: GistEngine, passages: list[Passage]
) -> None:
    stats = tiny_engine.generate(f"Continue: {passages[0].text}", SHORT).stats
    assert (stats.hits, stats.misses) == (0, 1)


def test_a_prompt_is_counted_as_it_is_read(
    tiny_engine: GistEngine, passages: list[Passage]
) -> None:
    prompt = ask(passages[:3])
    stats = tiny_engine.generate(prompt, SHORT).stats
    assert tiny_engine.count(prompt) == stats.input_tokens
    assert tiny_engine.count(prompt, "off") > 2 * stats.input_tokens


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (lambda text: ask([Passage(text)]), "found at characters"),
        (lambda text: [*ask([]), {"role": "assistant", "content": text}], "message of the model"),
        (lambda text: ask([Passage(text.lower())]), "does not occur"),
        (lambda text: f"Continue: {text}", "ends the prompt"),
    ],
    ids=["read", "said", "changed", "last"],
)
def test_why_a_passage_is_not_read_as_a_gist(
    tiny_engine: GistEngine, passages: list[Passage], write: Any, reason: str
) -> None:
    assert reason in tiny_engine.why_not(passages[0].text, write(passages[0].text))


def test_a_template_that_rewrites_its_messages_is_the_reason(
    tiny_engine: GistEngine, passages: list[Passage], monkeypatch: pytest.MonkeyPatch
) -> None:
    render = tiny_engine.backbone.render
    monkeypatch.setattr(tiny_engine.backbone, "render", lambda *a, **kw: render(*a, **kw).upper())
    assert "rewrites" in tiny_engine.why_not(passages[0].text, ask(passages[:1]))


def test_the_prefix_is_read_once(
    tiny_engine: GistEngine, passages: list[Passage], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_engine.generate(ask(passages[:1]), SHORT)
    monkeypatch.setattr(tiny_engine.backbone, "prefix", lambda ids: pytest.fail("read again"))
    tiny_engine.generate(ask(passages[1:2], "Why?"), SHORT)


# ---- stopping


def test_stop_strings_end_the_answer_before_them(
    tiny_engine: GistEngine, passages: list[Passage]
) -> None:
    whole = tiny_engine.generate(ask(passages[:1]), Sampling(max_tokens=20)).text
    stop = whole[4:7]
    answer = tiny_engine.generate(ask(passages[:1]), Sampling(max_tokens=20, stop=[stop]))
    assert answer.text == whole[: whole.index(stop)]
    assert answer.finish_reason == "stop"


def test_length_is_a_finish_reason(tiny_engine: GistEngine) -> None:
    answer = tiny_engine.generate("Count with me", Sampling(max_tokens=2))
    assert (answer.finish_reason, answer.num_tokens) == ("length", 2)


def test_cancelling_stops_between_tokens(tiny_engine: GistEngine, passages: list[Passage]) -> None:
    cancel = threading.Event()
    chunks = []
    for chunk in tiny_engine.stream(ask(passages[:1]), Sampling(max_tokens=200), cancel=cancel):
        chunks.append(chunk)
        if len(chunks) == 3:
            cancel.set()
    assert chunks[-1].answer is not None
    assert chunks[-1].answer.finish_reason == "cancelled"
    assert chunks[-1].answer.num_tokens < 20


@pytest.fixture
def forward_passes(tiny_engine: GistEngine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many prompts each forward pass of the model reads from here on."""
    tiny_engine.check_model()
    sizes: list[int] = []
    read = tiny_engine.backbone._hidden

    def counted(step: Any) -> Any:
        sizes.append(len(step.ids))
        return read(step)

    monkeypatch.setattr(tiny_engine.backbone, "_hidden", counted)
    return sizes


def test_a_request_that_was_cancelled_before_is_not_read(
    tiny_engine: GistEngine, passages: list[Passage], forward_passes: list[int]
) -> None:
    cancel = threading.Event()
    cancel.set()
    answer = tiny_engine.generate(ask(passages[:2]), SHORT, cancel=cancel)
    [chunk] = tiny_engine.stream(ask(passages[:2]), SHORT, cancel=cancel)
    assert chunk.answer is not None
    for ended in (answer, chunk.answer):
        assert (ended.text, ended.finish_reason, ended.num_tokens) == ("", "cancelled", 0)
        assert (ended.stats.input_tokens, list(ended.passages)) == (0, [])
    assert forward_passes == []


def test_the_cancelled_of_a_batch_are_dropped_before_it_is_read(
    tiny_engine: GistEngine, passages: list[Passage], forward_passes: list[int]
) -> None:
    prompts = [ask(passages[i : i + 2]) for i in range(4)]
    alone = [tiny_engine.generate(prompt, SHORT) for prompt in prompts]
    forward_passes.clear()
    gone = threading.Event()
    gone.set()
    cancels = [gone, None, gone, None]
    pairs = zip(prompts, cancels, strict=True)
    requests = [Request(prompt, SHORT, cancel=cancel) for prompt, cancel in pairs]
    answers = dict(ready for step in tiny_engine._answer(requests) for ready in step)
    assert [answers[i].finish_reason for i in (0, 2)] == ["cancelled"] * 2
    assert [answers[i].text for i in (1, 3)] == [alone[i].text for i in (1, 3)]
    assert [answers[i].passages for i in (1, 3)] == [alone[i].passages for i in (1, 3)]
    assert set(forward_passes) == {2}


def test_closing_a_stream_ends_it(tiny_engine: GistEngine) -> None:
    stream = tiny_engine.stream("Hello", Sampling(max_tokens=500))
    next(stream)
    stream.close()
    assert list(stream) == []


def test_sampling_is_repeatable_by_seed(tiny_engine: GistEngine) -> None:
    draw = lambda seed: (
        tiny_engine.generate(
            "Hello", Sampling(max_tokens=12, temperature=1.0, top_p=0.9, top_k=50, seed=seed)
        ).text
    )
    assert draw(1) == draw(1)
    assert len({draw(s) for s in range(4)}) > 1


def test_many_threads_get_the_answers_of_one(
    tiny_engine: GistEngine, passages: list[Passage]
) -> None:
    prompts = [ask(passages[i : i + 2]) for i in range(6)] * 2
    alone = [tiny_engine.generate(p, SHORT).text for p in prompts]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(lambda p: tiny_engine.generate(p, SHORT).text, prompts))
    assert together == alone


# ---- the store


def test_precompute_writes_each_content_once(
    make_engine: MakeEngine, passages: list[Passage]
) -> None:
    engine = make_engine(settings={"ratio": 4})
    twice = [*passages[:3], Passage(passages[0].text.replace(" ", "\n"), id="other-id")]
    assert engine.precompute(twice).written == 3
    again = engine.precompute(twice)
    assert (again.written, again.skipped) == (0, 4)


def test_a_changed_passage_is_not_read_from_the_old_gist(
    tiny_engine: GistEngine, passages: list[Passage]
) -> None:
    edited = Passage(passages[0].text.replace("original", "0riginal", 1))
    assert edited.content != passages[0].content
    assert tiny_engine.generate(ask([edited]), SHORT).stats.hits == 0


def test_another_namespace_is_never_read(make_engine: MakeEngine, passages: list[Passage]) -> None:
    ours = make_engine(settings={"ratio": 4}, namespace="ours")
    ours.precompute(passages[:1])
    theirs = make_engine(settings={"ratio": 4}, namespace="theirs")
    assert theirs.generate(ask(passages[:1]), SHORT).stats.hits == 0


@pytest.mark.parametrize(
    "change", [{"settings": {"ratio": 8}}, {"codec": "int8"}, {"name": "strided"}], ids=str
)
def test_a_space_is_all_that_a_gist_depends_on(
    make_engine: MakeEngine, change: dict[str, Any]
) -> None:
    assert (
        make_engine(settings={"ratio": 4}).space
        != make_engine(**{"settings": {"ratio": 4}} | change).space
    )


def test_passages_added_by_another_engine_are_found(
    make_engine: MakeEngine, passages: list[Passage], tmp_path: Path
) -> None:
    reader, writer = (make_engine(settings={"ratio": 4}) for _ in range(2))
    assert reader.generate(ask(passages[:1]), SHORT).stats.hits == 0
    writer.precompute(passages[:1])
    assert reader.generate(ask(passages[:1]), SHORT).stats.hits == 1
    writer.store.delete(passages[0].content)
    assert reader.generate(ask(passages[:1]), SHORT).stats.hits == 0


def test_a_damaged_gist_is_logged_and_rewritten(
    make_engine: MakeEngine,
    passages: list[Passage],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine = make_engine(settings={"ratio": 4})
    engine.precompute(passages[:2])
    expected = engine.generate(ask(passages[:2]), SHORT).text
    engine.close()
    [shard] = (tmp_path / "store" / "shards").iterdir()
    blob = bytearray(shard.read_bytes())
    blob[len(blob) // 4] ^= 0xFF
    shard.write_bytes(blob)

    healed = make_engine(settings={"ratio": 4})
    with caplog.at_level(logging.WARNING):
        answer = healed.generate(ask(passages[:2]), SHORT)
    assert "counts as a miss" in caplog.text
    assert (answer.text, answer.stats.hits) == (expected, 2)
    assert list(healed.store.verify()) == []


def test_int8_gists_read_almost_as_bf16_ones(
    make_engine: MakeEngine, passages: list[Passage]
) -> None:
    sizes = {}
    for codec in ("bf16", "int8"):
        engine = make_engine(settings={"ratio": 4}, codec=codec)
        sizes[codec] = engine.precompute(passages[:2]).num_bytes
        assert engine.generate(ask(passages[:2]), SHORT).stats.hits == 2
    assert sizes["int8"] < 0.75 * sizes["bf16"]


def test_a_store_of_its_own_is_gone_after_close(
    backbone: Backbone, passages: list[Passage]
) -> None:
    engine = GistEngine(backbone, make_compressor("strided", backbone))
    engine.precompute(passages[:1])
    folder = Path(engine._scratch.name) if engine._scratch else Path()
    assert folder.exists()
    engine.close()
    assert not folder.exists()


# ---- bad input


def test_require_raises_when_nothing_is_known(
    tiny_engine: GistEngine, passages: list[Passage]
) -> None:
    with pytest.raises(GistsRequired):
        tiny_engine.generate(ask(passages[20:21]), SHORT, gist_mode="require")


@pytest.mark.parametrize(
    ("prompt", "options", "error"),
    [
        ("", {}, BadInput),
        ([], {}, BadInput),
        ("Hello", {"gist_mode": "always"}, BadInput),
        ("word " * 5000, {}, ContextOverflow),
    ],
    ids=["empty text", "no messages", "unknown mode", "too long"],
)
def test_bad_prompts_are_refused(
    tiny_engine: GistEngine, prompt: Any, options: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        tiny_engine.generate(prompt, SHORT, **options)


def test_an_empty_corpus_is_refused(tiny_engine: GistEngine) -> None:
    with pytest.raises(BadInput, match="empty"):
        tiny_engine.precompute([])


def test_a_passage_too_long_is_named(make_engine: MakeEngine, passages: list[Passage]) -> None:
    engine = make_engine(settings={"ratio": 4})
    with pytest.raises(PassageTooLong, match="'long one'"):
        engine.precompute([*passages[:2], Passage("word " * 4000, id="long one")])


@pytest.mark.parametrize(
    "bad", [{"max_tokens": 0}, {"temperature": -1}, {"top_p": 0}, {"stop": [""]}], ids=str
)
def test_bad_sampling_is_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(BadInput):
        Sampling(**bad)


# ---- the correctness gate and unsupported models


def test_the_gate_refuses_a_model_that_reads_gists_wrongly(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys that are moved by a wrong rotation must not go unnoticed."""
    engine = make_engine(settings={"ratio": 4})
    rotary = engine.backbone.rotary
    monkeypatch.setattr(engine.backbone, "rotary", lambda positions: rotary(positions * 2))
    monkeypatch.setattr(engine.backbone, "_angles", (torch.empty(0), torch.empty(0)))
    with pytest.raises(GateFailed, match="cannot be read with gists"):
        engine.check_model()


def test_the_gate_passes_on_every_family(any_backbone: Backbone, tmp_path: Path) -> None:
    compressor = make_compressor("full", any_backbone)
    with GistEngine(any_backbone, compressor, tmp_path / "s") as engine:
        engine.check_model()


@pytest.mark.parametrize(
    ("family", "settings", "reason"),
    [
        ("gpt2", {}, "keeps its layers elsewhere"),
        ("mistral", {"sliding_window": 64}, "sliding-window"),
        ("phi3", {}, "fused"),
        ("gemma3_text", {}, "not been checked"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "RoPE type 'dynamic'",
        ),
    ],
)
def test_unsupported_models_are_refused_with_the_reason(
    tokenizer: Any, family: str, settings: dict[str, Any], reason: str
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = dict(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    config = AutoConfig.for_model(family, **shape | settings)
    with pytest.raises(UnsupportedBackbone, match=reason):
        Backbone(AutoModelForCausalLM.from_config(config), tokenizer, family)


def test_a_borrowed_model_still_works_on_its_own(backbone: Backbone) -> None:
    """The registered attention is SDPA wherever no gists are given."""
    ids = backbone.tokenize("The rollback journal is deleted.")[None]
    ours = backbone.model(ids).logits
    backbone.model.set_attn_implementation("sdpa")
    try:
        assert torch.equal(backbone.model(ids).logits, ours)
    finally:
        backbone.model.set_attn_implementation("gist_rag")
    assert attend.__module__ == "gist_rag.attention"


def test_gist_key_is_made_of_space_and_content(
    tiny_engine: GistEngine, passages: list[Passage]
) -> None:
    key = GistKey(tiny_engine.space, passages[0].content)
    packed = tiny_engine.store.get(key)
    assert packed is not None
    assert packed.num_tokens == len(tiny_engine.backbone.tokenize(passages[0].text))


@pytest.mark.parametrize("empty", [[Text("")], [Text(""), Text("")]], ids=["one", "two"])
def test_empty_segments_are_an_empty_prompt(tiny_engine: GistEngine, empty: list[Text]) -> None:
    with pytest.raises(BadInput, match="the prompt is empty"):
        tiny_engine.generate(empty)


def test_segments_made_by_hand_may_end_empty_and_hold_a_passage_twice(
    tiny_engine: GistEngine, passages: list[Passage]
) -> None:
    """A passage that ends a prompt is text, and one object may stand in two places."""
    known = Known(passages[0].content, passages[0].text)
    ended = tiny_engine.generate([Text("Documents:\n"), known, Text("")], Sampling(max_tokens=2))
    assert ended.stats.hits == 0
    question = Text("\n\nWhat is SQLite?")
    twice = tiny_engine.generate([Text("A:\n"), known, Text("\nB:\n"), known, question])
    assert (twice.stats.hits, twice.stats.left_out) == (2, 0)


def test_nothing_is_compressed_for_a_store_that_another_process_writes(
    make_engine: Callable[..., GistEngine],
    passages: list[Passage],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = make_engine(settings={"ratio": 4})
    engine.precompute(passages[:1])
    monkeypatch.setattr(engine, "_compress", lambda batch: pytest.fail("compressed in vain"))
    with GistStore.open(engine.store.path) as other:
        other.acquire()
        with pytest.raises(StoreLocked):
            engine.precompute(passages[:2])
