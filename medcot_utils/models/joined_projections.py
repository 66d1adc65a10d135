"""Join the projections that read the same input into one product: small products do not use a GPU's whole bandwidth."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

_READ_THE_SAME = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class _Product:
    """Hold the joined weight of several projections, and their outputs until each has returned its own."""

    def __init__(self, layers: Sequence[torch.nn.Linear]) -> None:
        self._weight = torch.cat([layer.weight for layer in layers])
        self._bias = None if layers[0].bias is None else torch.cat([layer.bias for layer in layers])
        self._sizes = [layer.out_features for layer in layers]
        self._hidden: torch.Tensor | None = None
        self._outputs: tuple[torch.Tensor, ...] = ()

    def part(self, place: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return weight and bias of one projection, as views of the joined ones."""
        bias = None if self._bias is None else self._bias.split(self._sizes)[place]
        return self._weight.split(self._sizes)[place], bias

    def output(self, place: int, hidden: torch.Tensor) -> torch.Tensor:
        """Return the output of one projection. The product is computed once for all that are given the same tensor."""
        if hidden is not self._hidden:
            self._hidden = hidden
            self._outputs = torch.nn.functional.linear(hidden, self._weight, self._bias).split(self._sizes, dim=-1)
        found = self._outputs[place]
        if place == len(self._sizes) - 1:
            self._hidden, self._outputs = None, ()
        return found


class JoinedLinear(torch.nn.Linear):
    """Stand in for one of the projections that share a joined weight."""

    def __init__(self, layer: torch.nn.Linear, product: _Product, place: int) -> None:
        """Make the stand-in of a layer. Args: place: its place among the joined layers."""
        with torch.device("meta"):
            super().__init__(layer.in_features, layer.out_features, bias=layer.bias is not None)
        weight, bias = product.part(place)
        self.weight = torch.nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            self.bias = torch.nn.Parameter(bias, requires_grad=False)
        self._product, self._place = product, place

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the projection's outputs (..., out_features) for inputs (..., in_features)."""
        return self._product.output(self._place, hidden)


@torch.no_grad()
def join_projections(model: PreTrainedModel) -> PreTrainedModel:
    """Join query, key, and value projections, and those of the gated feed-forward layer, in place. Return the model.

    Projections that are not plain linear layers stay as they are. The weights keep their values and take no more memory."""
    for module in list(model.modules()):
        for names in _READ_THE_SAME:
            layers = [getattr(module, name, None) for name in names]
            if any(type(layer) is not torch.nn.Linear for layer in layers) or len({_form(layer) for layer in layers}) > 1:
                continue
            product = _Product(layers)
            for place, (name, layer) in enumerate(zip(names, layers, strict=True)):
                setattr(module, name, JoinedLinear(layer, product, place))
    return model


def _form(layer: torch.nn.Linear) -> tuple[int, bool, torch.dtype, torch.device]:
    return layer.in_features, layer.bias is None, layer.weight.dtype, layer.weight.device
