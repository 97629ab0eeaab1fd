"""Low-rank updates of a borrowed backbone, in force only inside a ``with``.

Hooks add the update to the outputs of linear layers and are taken off again, so that the backbone
is never changed: its other readers, its fingerprint and the teacher of a training step see the
plain model. An update may be confined to some rows of a pass (conditional LoRA: gists are computed
with other weights than the tokens around them, which stay exactly the backbone's own).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from gist_rag.backbone import Backbone
from gist_rag.errors import BadInput


class LoRAConfig(BaseModel):
    """Shape of the updates.

    Attributes:
        rank: of each update; 0 for none.
        alpha: updates are scaled by ``alpha / rank``.
        targets: names of linear layers inside a decoder layer.
        first_layer: decoder layers below stay as they are (and cost no backward pass).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    rank: int = Field(default=16, ge=0)
    alpha: float = Field(default=32.0, gt=0)
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    first_layer: int = Field(default=0, ge=0)


class LoRA(nn.Module):
    """``W x + alpha / rank * B A x`` (LoRA, arXiv:2106.09685), starting as ``W x``.

    Raises:
        BadInput: the backbone has none of the layers named.
    """

    def __init__(self, backbone: Backbone, config: LoRAConfig) -> None:
        super().__init__()
        self.config = config
        self._lock = backbone.lock
        linears = dict(_linears(backbone, config))
        if not linears and config.rank:
            raise BadInput(
                f"{backbone.name} has no layer {', '.join(config.targets)} from layer "
                f"{config.first_layer} of {backbone.num_layers} on"
            )
        # Kept out of the module tree: the backbone is neither saved nor moved with the updates.
        object.__setattr__(self, "_linears", linears)
        self.down, self.up = nn.ParameterDict(), nn.ParameterDict()
        for name, linear in linears.items():
            down = torch.empty(config.rank, linear.in_features)
            nn.init.kaiming_uniform_(down, a=math.sqrt(5))
            self.down[name] = nn.Parameter(down)
            self.up[name] = nn.Parameter(torch.zeros(linear.out_features, config.rank))
        self.to(backbone.device)

    _linears: Mapping[str, nn.Linear]

    @contextmanager
    def active(self, rows: Tensor | None = None) -> Iterator[None]:
        """Updates are in force inside; other threads wait to use the backbone.

        Args:
            rows: ``(B, S)``, 1 where a row of the pass is to be updated; ``None`` for all.
        """
        scale = self.config.alpha / max(1, self.config.rank)
        with self._lock, ExitStack() as stack:
            if rows is None or bool(rows.any()):
                for name, linear in self._linears.items():
                    hook = linear.register_forward_hook(
                        _update(self.down[name], self.up[name], scale, rows)
                    )
                    stack.callback(hook.remove)
            yield


def _linears(backbone: Backbone, config: LoRAConfig) -> Iterator[tuple[str, nn.Linear]]:
    """Target layers by path, with ``/`` because parameter names must not hold dots."""
    if not config.rank:
        return
    for index, layer in enumerate(backbone.layers):
        if index < config.first_layer:
            continue
        for path, module in layer.named_modules():
            if path.rpartition(".")[2] in config.targets and isinstance(module, nn.Linear):
                yield f"model/layers/{index}/{path.replace('.', '/')}", module


def _update(
    down: Tensor, up: Tensor, scale: float, rows: Tensor | None
) -> Callable[[nn.Module, Sequence[Any], Tensor], Tensor]:
    first = 0 if rows is None else int(rows.amax(0).argmax())  # rows before it cost nothing

    def hook(_module: nn.Module, inputs: Sequence[Any], output: Tensor) -> Tensor:
        x: Tensor = inputs[0][:, first:]
        low = x @ down.to(x.dtype).T
        if rows is not None:
            low = low * rows[:, first:, None].to(x.dtype)
        return output + nn.functional.pad(low @ up.to(x.dtype).T * scale, (0, 0, first, 0))

    return hook
