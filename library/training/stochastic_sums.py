"""StochasticSums: gradients of bfloat16 weights that add up over micro-batches without losing what is small."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from library.data.order import Place
from library.draws import seed_of
from library.param_group import ParamGroup
from library.training.rounding import round_stochastically


class StochasticSums:
    """Each sum of a gradient and what was there before it is rounded stochastically; autograd alone would round to nearest."""

    def __init__(self, groups: Sequence[ParamGroup], seed: int):
        self._seed = seed
        self._place: Place | None = None
        for group in groups:
            for name, parameter in group.parameters.items():
                if parameter.dtype is torch.bfloat16:
                    parameter.register_hook(lambda new, name=name, own=parameter: self._sum(new, name, own))

    def begin(self, place: Place) -> None:
        """Before a micro-batch's backward."""
        self._place = place

    @torch.no_grad()
    def _sum(self, new: Tensor, name: str, parameter: nn.Parameter) -> Tensor | None:
        """What autograd is to take as the parameter's gradient. None: `new` as it is."""
        before = parameter.grad
        if before is None:
            return None
        assert self._place is not None
        parameter.grad = None  # or autograd would add it again
        draw = torch.Generator(new.device).manual_seed(
            seed_of(self._seed, "sums", self._place.epoch, self._place.first, name)
        )
        return round_stochastically(before.float().add_(new), draw)
