"""Tiny random models of every supported family, and the embedded model for real tests."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from gist_rag.backbone import Backbone
from gist_rag.compressors import make_compressor
from gist_rag.engine import GistEngine
from gist_rag.likeness import named_embedder
from gist_rag.models import DEFAULT_EMBEDDER, DEFAULT_RAG_MODEL, load_model
from gist_rag.reader import Reader, load_reader
from gist_rag.retrieval import SentenceEmbedder
from gist_rag.sample import sample_passages
from gist_rag.types import Passage

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SHAPE = dict(
    hidden_size=48,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=4096,
    initializer_range=0.2,
    tie_word_embeddings=False,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=2,
)
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama3_rope": {"model_type": "llama", "rope_parameters": LLAMA3_ROPE},
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3"},
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def passages() -> list[Passage]:
    return sample_passages()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A small byte-level BPE with a ChatML template, trained on the sample."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator([p.text for p in sample_passages()], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
    )
    fast.chat_template = CHATML
    return fast


def random_model(tokenizer: PreTrainedTokenizerFast, family: str) -> Any:
    """A random three-layer model of a family."""
    torch.manual_seed(0)
    settings = SHAPE | FAMILIES[family] | {"vocab_size": len(tokenizer)}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings)).eval()


@pytest.fixture(scope="session")
def make_model(tokenizer: PreTrainedTokenizerFast) -> Callable[[str], Any]:
    """Random models by family name."""
    return lambda family: random_model(tokenizer, family)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def any_backbone(tokenizer: PreTrainedTokenizerFast, family: str) -> Backbone:
    """A backbone of each supported family in turn."""
    return Backbone(random_model(tokenizer, family), tokenizer, family)


@pytest.fixture(scope="session")
def backbone(tokenizer: PreTrainedTokenizerFast) -> Backbone:
    return Backbone(random_model(tokenizer, "llama"), tokenizer, "tiny-llama")


@pytest.fixture(scope="session")
def tiny_model_folder(
    tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A saved random Llama with its tokenizer, for whatever takes a model by name."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    random_model(tokenizer, "llama").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def make_engine(backbone: Backbone, tmp_path: Path) -> Iterator[Callable[..., GistEngine]]:
    """Engines over the tiny model; all are closed at the end."""
    engines: list[GistEngine] = []

    def make(
        name: str = "attention_matching",
        store: Path | None = None,
        settings: dict[str, Any] | None = None,
        **options: Any,
    ) -> GistEngine:
        compressor = make_compressor(name, backbone, settings)
        engines.append(GistEngine(backbone, compressor, store or tmp_path / "store", **options))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


@pytest.fixture
def tiny_engine(make_engine: Callable[..., GistEngine], passages: list[Passage]) -> GistEngine:
    """An engine over the tiny model with the first eight sample passages compressed at 4x."""
    engine = make_engine(settings={"ratio": 4})
    engine.precompute(passages[:8])
    return engine


@pytest.fixture(scope="session")
def minilm() -> SentenceEmbedder:
    """The packaged embedder."""
    return named_embedder(DEFAULT_EMBEDDER)


@pytest.fixture(scope="session")
def embedded_backbone() -> Backbone:
    """The embedded model, SmolLM2-135M-Instruct."""
    return Backbone(*load_model(), name="smollm2-135m-instruct")


@pytest.fixture(scope="session")
def embedded_reader(embedded_backbone: Backbone) -> Reader:
    """The reader that ships for it."""
    return load_reader(DEFAULT_RAG_MODEL, embedded_backbone)
