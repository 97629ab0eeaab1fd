"""A reader: in force from the invocation on, and nowhere else."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

from gist_rag.backbone import Backbone, Context, Local
from gist_rag.engine import GistEngine
from gist_rag.errors import BadInput
from gist_rag.evaluate.metrics import f1
from gist_rag.lora import LoRAConfig
from gist_rag.prompt import rag_messages
from gist_rag.reader import Reader, load_backbone
from gist_rag.sample import sample_questions
from gist_rag.types import Passage, Sampling

ASK = "Question: what is SQLite?"
BEGIN = "Answer:"


@pytest.fixture
def reader(backbone: Backbone) -> Reader:
    """A reader that does something."""
    made = Reader(backbone, LoRAConfig(rank=4), BEGIN)
    torch.manual_seed(3)
    for up in made.up.values():
        torch.nn.init.normal_(up, std=0.3)
    return made.requires_grad_(False)


def logits(backbone: Backbone, prompt: str, reader: Reader | None) -> torch.Tensor:
    ids = backbone.tokenize(prompt)
    nothing = Context([backbone.prefix(ids[:0])], None)
    return backbone.read(nothing, [Local.after(ids, 0, 0)], adapter=reader)[0]


def test_what_stands_before_the_invocation_is_the_backbones_own(
    backbone: Backbone, reader: Reader
) -> None:
    prompt = f"{ASK}\n{BEGIN} It is"
    begins = reader.begins(backbone.tokenize(prompt))
    plain, read = logits(backbone, prompt, None), logits(backbone, prompt, reader)
    assert begins > 0
    assert torch.equal(plain[:begins], read[:begins])
    assert not torch.allclose(plain[begins], read[begins], atol=1e-2)


def test_the_last_invocation_counts(backbone: Backbone, reader: Reader) -> None:
    first, last = f"{BEGIN} no. {ASK}\n", f"{BEGIN} yes"
    begins = reader.begins(backbone.tokenize(first + last))
    assert begins == len(backbone.tokenize(first + last)) - len(backbone.tokenize(last))


def test_without_an_invocation_the_plain_model_answers(backbone: Backbone, reader: Reader) -> None:
    assert torch.equal(logits(backbone, ASK, None), logits(backbone, ASK, reader))


def test_rows_of_a_batch_do_not_mix(
    make_engine: Callable[..., GistEngine], passages: list[Passage], reader: Reader
) -> None:
    """A prompt with and one without invocation, gists and none: as one by one."""
    engine = make_engine(settings={"ratio": 2}, reader=reader)
    engine.precompute(passages[:2])
    prompts = [f"{passages[0].text}\n\n{ASK}\n{BEGIN}", ASK, f"{ASK}\n{BEGIN}"]
    together = engine.batch(prompts, Sampling(max_tokens=8))
    alone = [engine.batch([p], Sampling(max_tokens=8))[0] for p in prompts]
    assert [a.text for a in together] == [a.text for a in alone]
    assert together[0].stats.hits == 1


def test_gists_do_not_depend_on_the_reader(
    make_engine: Callable[..., GistEngine], passages: list[Passage], reader: Reader, tmp_path: Path
) -> None:
    plain = make_engine(store=tmp_path / "plain")
    read = make_engine(store=tmp_path / "read", reader=reader)
    assert plain.space == read.space
    for engine in (plain, read):
        engine.precompute(passages[:2])
    for passage in passages[:2]:
        ours, theirs = (e._load({passage.content})[passage.content] for e in (plain, read))
        assert ours.tensors.keys() == theirs.tensors.keys()
        assert all(torch.equal(ours.tensors[k], theirs.tensors[k]) for k in ours.tensors)


def test_peft_answers_alike(backbone: Backbone, reader: Reader, tmp_path: Path) -> None:
    """The folder is an activated LoRA of peft's: same tokens from text."""
    peft = pytest.importorskip("peft")
    reader.save_pretrained(tmp_path)
    loaded = Reader.from_pretrained(tmp_path, backbone)
    model = deepcopy(backbone.model)
    model.set_attn_implementation("sdpa")
    theirs = peft.PeftModel.from_pretrained(model, tmp_path)
    ids = backbone.tokenize(f"{ASK}\n{BEGIN}")
    tokens = theirs.generate(
        input_ids=ids[None],
        attention_mask=torch.ones_like(ids[None]),
        max_new_tokens=12,
        do_sample=False,
    )[0, len(ids) :]
    nothing = Context([backbone.prefix(ids[:0])], None)
    steps = backbone.decode(
        nothing, [Local.after(ids, 0, 0)], [Sampling(max_tokens=12)], adapter=loaded
    )
    assert [step[0] for step in steps] == tokens.tolist()


def test_a_folder_comes_with_a_model(
    tiny_model_folder: Path, reader: Reader, tmp_path: Path, backbone: Backbone
) -> None:
    reader.save_pretrained(tmp_path)
    other, loaded = load_backbone(str(tiny_model_folder), tmp_path, device="cpu")
    assert loaded is not None
    assert other.fingerprint == backbone.fingerprint
    assert torch.equal(loaded.invocation, reader.invocation)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": None}, "holds no reader"),
        ({"r": 3}, "holds no reader"),
    ],
)
def test_a_wrong_folder_is_refused(
    backbone: Backbone, reader: Reader, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    reader.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(BadInput, match=message):
        Reader.from_pretrained(tmp_path, backbone)


def test_the_reader_of_another_model_is_refused(
    tokenizer: Any, make_model: Callable[[str], Any], reader: Reader, tmp_path: Path
) -> None:
    reader.save_pretrained(tmp_path)
    other = Backbone(make_model("qwen3"), tokenizer, "tiny-qwen3")
    with pytest.raises(BadInput, match="was trained for tiny-llama, which is not tiny-qwen3"):
        Reader.from_pretrained(tmp_path, other)


@pytest.mark.slow
def test_the_reader_that_ships_answers_in_a_few_words(
    embedded_backbone: Backbone, embedded_reader: Reader
) -> None:
    """From the gold passage as text: short, and right more often than the plain model."""
    right = {}
    for name, reader in (("plain", None), ("reader", embedded_reader)):
        written = []
        for question in sample_questions()[:8]:
            prompt = embedded_backbone.render(rag_messages(question.text, question.gold))
            ids = embedded_backbone.tokenize(prompt)
            nothing = Context([embedded_backbone.prefix(ids[:0])], None)
            opened = embedded_backbone.open(nothing, [Local.after(ids, 0, 0)], reader)
            written += embedded_backbone.write(opened, 24)
        answers = [q.answers for q in sample_questions()]
        right[name] = sum(f1(w, a) for w, a in zip(written, answers, strict=False))
    assert right["reader"] > right["plain"] + 1
    assert max(len(text.split()) for text in written) <= 12


def test_a_folder_without_a_reader_is_refused(backbone: Backbone, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="holds no reader"):
        Reader.from_pretrained(tmp_path, backbone)
