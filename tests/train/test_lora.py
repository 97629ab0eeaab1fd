"""LoRA on a borrowed backbone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gist_rag.backbone import Backbone
from gist_rag.errors import BadInput
from gist_rag.lora import LoRA, LoRAConfig

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])


@pytest.fixture
def lora(backbone: Backbone) -> LoRA:
    """An update that does something."""
    made = LoRA(backbone, LoRAConfig(rank=4))
    for up in made.up.values():
        torch.nn.init.normal_(up, std=0.1)
    return made


@torch.no_grad()
def encode(backbone: Backbone) -> Tensor:
    return backbone.encode(IDS)


def test_starts_as_the_plain_model(backbone: Backbone) -> None:
    plain = encode(backbone)
    with LoRA(backbone, LoRAConfig(rank=4)).active():
        assert torch.equal(encode(backbone), plain)


def test_is_in_force_inside_only(backbone: Backbone, lora: LoRA) -> None:
    plain = encode(backbone)
    with lora.active():
        changed = encode(backbone)
    assert not torch.allclose(changed, plain)
    assert torch.equal(encode(backbone), plain)


def test_an_error_inside_takes_it_off(backbone: Backbone, lora: LoRA) -> None:
    plain = encode(backbone)
    with pytest.raises(ZeroDivisionError), lora.active():
        _ = 1 / 0
    assert torch.equal(encode(backbone), plain)


def test_rows_confine_it(backbone: Backbone, lora: LoRA) -> None:
    """Rows before the first updated one stay exactly the backbone's own; the updated one moves."""
    plain = encode(backbone)
    with lora.active(torch.tensor([[0.0, 0, 1, 0], [0, 0, 0, 0]])):
        changed = encode(backbone)
    assert torch.equal(changed[:, 0, :2], plain[:, 0, :2])
    assert torch.equal(changed[:, 1], plain[:, 1])
    assert not torch.allclose(changed[1, 0, 2], plain[1, 0, 2])


def test_lower_layers_stay_out(backbone: Backbone) -> None:
    lora = LoRA(backbone, LoRAConfig(rank=2, first_layer=2))
    assert {name.split("/")[2] for name in lora.down} == {"2"}


def test_a_layer_that_is_not_there_is_refused(backbone: Backbone) -> None:
    with pytest.raises(BadInput, match="no layer qkv"):
        LoRA(backbone, LoRAConfig(targets=("qkv",)))
