"""Sums of squares of single gradients, taken before the sample that they are part of is closed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from . import ops
from .row import Listed, LossScale, Rules
from .spread import Places


class EarlySums:
    """What will be gone, or changed, when the sample is closed: by parameter, without its loss scale.

    By parameter and not by column, because a seed may come or go before the sample is closed. Of a parameter that is
    taken twice the first sum counts.
    """

    def __init__(self) -> None:
        self._parameters: dict[int, Tensor] = {}
        self._sums: list[Tensor] = []

    def __contains__(self, parameter: Tensor) -> bool:
        """Whether its gradient is here."""
        return id(parameter) in self._parameters

    def __len__(self) -> int:
        """How many gradients there are."""
        return len(self._parameters)

    @property
    def device(self) -> torch.device | None:
        """Where the first of them lies; None when there is none."""
        return self._sums[0].device if self._sums else None

    def add(self, parameters: Sequence[Tensor], sums: Tensor, scale: Tensor | None) -> None:
        """The sums (float64 [n]) of the gradients of n parameters that are not here yet, ``scale`` times too large."""
        if not parameters:
            return
        if scale is not None:
            sums = sums / scale.to(sums.device).double().reshape(()).square()
        self._parameters.update((id(parameter), parameter) for parameter in parameters)
        self._sums.append(sums)

    @torch.no_grad()
    def take(
        self,
        parameters: Iterable[Tensor],
        watched: Places,
        rules: Rules,
        scale: LossScale,
    ) -> None:
        """Sum the gradients of these parameters as they are now, of those that are watched and not here yet.

        Those of guarded columns become zeros, as by a whole measurement: only what is summed in this call, because
        other gradients of the column may have been used already.
        """
        own = {id(p): p for p in parameters if p not in self and p.grad is not None}
        found = [(p, column) for p in own.values() if (column := watched.column_of(p)) is not None]
        gradients = [watched.part_of(p.grad) for p, _ in found if p.grad is not None]
        if not gradients:
            return
        # A segment for each: one launch for all.
        sums = ops.segmented_sumsq(gradients, range(len(gradients)), len(gradients), lanes=rules.lanes)
        ops.quarantine_(Listed(gradients, [column for _, column in found]), sums, rules)
        self.add([parameter for parameter, _ in found], sums, scale.gradients)

    def listed(self, watched: Places, device: torch.device) -> tuple[Tensor, tuple[list[int], list[int]], list[int]]:
        """Sums (float64 [n] on ``device``); elements, columns; whose, by ``id``: of what is watched still."""
        sums = torch.cat([torch.empty(0, dtype=torch.float64, device=device), *(s.to(device) for s in self._sums)])
        columns = {identity: watched.column_of(parameter) for identity, parameter in self._parameters.items()}
        known = {identity: column for identity, column in columns.items() if column is not None}
        if len(known) < len(columns):
            sums = sums[[index for index, identity in enumerate(columns) if identity in known]]
        elements = [watched.part_of(self._parameters[identity]).numel() for identity in known]
        return sums, (elements, list(known.values())), list(known)
