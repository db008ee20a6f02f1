"""The sizes of a sparse model, which tell the model of a plan from others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .checks import read_list, read_object, read_whole


@dataclass(frozen=True)
class SparseLayerShape:
    """The sizes of one sparse layer, which tell a plan's model from others.

    Args:
        layer (`int`): Decoder layer index.
        num_experts (`int`): Routed experts N.
        intermediate_size (`int`): Neurons of one routed expert.
        shared_intermediate_size (`int`): Neurons of the shared expert; 0 without one.
    """

    layer: int
    num_experts: int
    intermediate_size: int
    shared_intermediate_size: int


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a sparse model that a plan must agree with before it is applied."""

    model_type: str
    num_hidden_layers: int
    hidden_size: int
    sparse_layers: list[SparseLayerShape]

    @property
    def has_shared(self) -> bool:
        """Whether all sparse layers have a shared expert."""
        return all(row.shared_intermediate_size for row in self.sparse_layers)

    @classmethod
    def from_dict(cls, values: Any) -> ModelShape:
        fields = read_object(values, "model", cls.__dataclass_fields__)
        if not isinstance(fields["model_type"], str):
            raise ValueError(f"`model.model_type` should be a string, but is {fields['model_type']!r}.")
        for name in ("num_hidden_layers", "hidden_size"):
            read_whole(fields[name], f"model.{name}")
        rows = []
        for i, row in enumerate(read_list(fields["sparse_layers"], "model.sparse_layers")):
            where = f"model.sparse_layers[{i}]"
            row = read_object(row, where, SparseLayerShape.__dataclass_fields__)
            rows.append(SparseLayerShape(**{k: read_whole(v, f"{where}.{k}") for k, v in row.items()}))
        return cls(**{**fields, "sparse_layers": rows})
