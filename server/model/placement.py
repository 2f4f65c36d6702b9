"""Weights on their way from a checkpoint to the device; equal code tables become one tensor.

Double quantization comes with a table of 1 KiB per linear. It is the same in every linear, and kept 210 times it would
cost SmolLM2 0.016 bits per weight.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from lorry.kernels.nf4 import NF4Weight
from lorry.server.model.weights import LinearWeight


class Placement:
    """`place` moves weights to `device`; the tables of all NF4 weights that passed through one Placement are shared."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._tables: list[Tensor] = []

    def place(self, weight: LinearWeight) -> LinearWeight:
        """The same weight on the device."""
        if isinstance(weight, Tensor):
            return weight.to(self.device)
        nested, code = weight.nested_absmax, weight.nested_code
        return dataclasses.replace(
            weight,
            packed=weight.packed.to(self.device),
            absmax=weight.absmax.to(self.device),
            nested_absmax=None if nested is None else nested.to(self.device),
            nested_code=None if code is None else self._shared(code),
            code=self._shared(weight.code),
        )

    def _shared(self, table: Tensor) -> Tensor:
        table = table.to(self.device)
        for known in self._tables:
            if torch.equal(known, table):
                return known
        self._tables.append(table)
        return table


def tables_of(weight: NF4Weight) -> list[Tensor]:
    """The tables of a weight that others may share."""
    return [weight.code] if weight.nested_code is None else [weight.code, weight.nested_code]
