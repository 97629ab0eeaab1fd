"""Who answers: an update that is in force from the model's own turn on, and never before.

Everything up to the invocation (by default what the chat template writes before an answer) is read
by the plain backbone; the answer is written by the updated one (activated LoRA, arXiv:2504.12397).
So gists, which are the backbone's, serve every reader, and a reader may come and go beside a store
that is filled. The folder of a reader is a PEFT adapter, which peft reads in the same way.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gist_rag.backbone import Backbone
from gist_rag.errors import BadInput
from gist_rag.lora import LoRA, LoRAConfig
from gist_rag.models import READERS, load_model

WEIGHTS = "adapter_model.safetensors"
SETTINGS = "adapter_config.json"


class Reader(LoRA):
    """A LoRA from an invocation on.

    Args:
        invocation: text whose last occurrence in a prompt starts the update; default: what the
            chat template writes before an answer. A prompt without it is read by the plain model.

    Raises:
        BadInput: no invocation is given, and the model has no chat template to tell it.
    """

    def __init__(self, backbone: Backbone, config: LoRAConfig, invocation: str = "") -> None:
        super().__init__(backbone, config)
        self.backbone_name = READERS.get(backbone.name, backbone.name)
        self.backbone_fingerprint = backbone.fingerprint
        self.invocation = backbone.tokenize(invocation or backbone.opening)
        if not len(self.invocation):
            raise BadInput(f"{backbone.name} has no chat template; say where an answer begins")

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over settings, invocation and weights; what answers depend on beside gists."""
        settings = [self.config.model_dump(mode="json"), self.invocation.tolist()]
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        for name, weight in sorted(self.state_dict().items()):
            digest.update(name.encode())
            digest.update(weight.detach().cpu().float().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def begins(self, input_ids: Tensor) -> int:
        """Place of the last invocation in ``(Q,)`` tokens; ``Q`` where there is none."""
        size = len(self.invocation)
        if len(input_ids) < size:
            return len(input_ids)
        found = (input_ids.cpu().unfold(0, size, 1) == self.invocation).all(1).nonzero()
        return int(found[-1]) if len(found) else len(input_ids)

    def rows(self, input_ids: Tensor) -> Tensor:
        """``(Q,)``, 1 from the last invocation on."""
        return (torch.arange(len(input_ids)) >= self.begins(input_ids)).float()

    def save_pretrained(self, folder: Path | str) -> None:
        """Write a PEFT adapter in bfloat16."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        tensors = {
            _key(name, letter): weight.detach().bfloat16().contiguous()
            for name, letter, weight in self._weights()
        }
        made_for = {"format": "pt", "backbone_fingerprint": self.backbone_fingerprint}
        save_file(tensors, path / WEIGHTS, metadata=made_for)
        document = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": self.backbone_name,
            "r": self.config.rank,
            "lora_alpha": self.config.alpha,
            "lora_dropout": 0.0,
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
            "target_modules": list(self.config.targets),
            "layers_to_transform": sorted({int(name.split("/")[2]) for name in self._linears}),
            "alora_invocation_tokens": self.invocation.tolist(),
        }
        (path / SETTINGS).write_text(json.dumps(document, indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, folder: Path | str, backbone: Backbone) -> Self:
        """Read what ``save_pretrained`` wrote.

        Raises:
            BadInput: the folder holds no reader, or that of another model.
        """
        path = Path(folder)
        try:
            document: dict[str, Any] = json.loads((path / SETTINGS).read_text())
            config = LoRAConfig(
                rank=document["r"],
                alpha=document["lora_alpha"],
                targets=tuple(document["target_modules"]),
                first_layer=min(document["layers_to_transform"]),
            )
            invocation = torch.tensor(document["alora_invocation_tokens"])
            with safe_open(path / WEIGHTS, "pt") as file:
                made_for = file.metadata()["backbone_fingerprint"]
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise BadInput(f"{folder} holds no reader: {error}") from error
        if made_for != backbone.fingerprint:
            raise BadInput(
                f"{folder} was trained for {document['base_model_name_or_path']}, "
                f"which is not {backbone.name}"
            )
        reader = cls(backbone, config)
        reader.invocation = invocation
        try:
            for name, letter, weight in reader._weights():
                weight.data.copy_(tensors[_key(name, letter)])
        except (KeyError, RuntimeError) as error:
            raise BadInput(f"{folder} holds no reader: {error}") from error
        return reader.requires_grad_(False)

    def _weights(self) -> Iterator[tuple[str, str, Tensor]]:
        """Path of a layer, ``A`` or ``B``, and the weight."""
        for name in self._linears:
            yield name, "A", self.down[name]
            yield name, "B", self.up[name]


def load_backbone(
    model: str,
    reader: Path | str | None = None,
    *,
    dtype: str | None = None,
    device: str | None = None,
) -> tuple[Backbone, Reader | None]:
    """A backbone by name, and who answers with it: the reader asked for, or the one of the name.

    Args:
        model, dtype, device: see ``models.load_model``.
        reader: alias or folder of a reader.
    """
    backbone = Backbone(*load_model(model, dtype=dtype, device=device), name=model)
    reader = reader or (model if model in READERS else None)
    return backbone, None if reader is None else load_reader(reader, backbone)


def load_reader(name: Path | str, backbone: Backbone) -> Reader:
    """A reader that ships, by its alias, or one from a folder."""
    shipped = Path(__file__).with_name("data") / str(name)
    return Reader.from_pretrained(shipped if name in READERS else name, backbone)


def _key(name: str, letter: str) -> str:
    return f"base_model.model.{name.replace('/', '.')}.lora_{letter}.weight"
