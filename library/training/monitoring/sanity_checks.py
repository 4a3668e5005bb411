"""Watch: that what is trained gets gradients and changes, and is the same on all processes."""

import operator
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from library.errors import RunError
from library.param_group import ParamGroup

_STEPS = 50  # after which everything that is trained must have got a gradient and changed
_LEAST = 10  # steps of a shorter run that still say something: a LoRA's down projection has none in the first
_SHOWN = 5
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class GradientFlowCheck:
    """Of the first steps that a run does: which parameters got a gradient, and which changed."""

    def __init__(self, groups: Sequence[ParamGroup], done: int = 0):
        """Args:
        groups: those that stop early aren't watched, as they may have no chance.
        done: the step that the run begins at, which may lie behind what a group stops at.
        """
        lasts = [
            group.last_step is None or group.last_step - done > _STEPS for group in groups for _ in group.parameters
        ]
        everything = [item for group in groups for item in group.parameters.items()]
        self._parameters: dict[str, nn.Parameter] = {
            name: parameter for (name, parameter), is_watched in zip(everything, lasts, strict=True) if is_watched
        }
        self._start = checksums(self._parameters.values())
        self._watched = torch.tensor(lasts, dtype=torch.bool, device=self._start.device)
        self._moved = torch.zeros_like(self._watched)
        self._steps = 0
        self._is_over = not self._parameters

    def note_gradients(self, norms: Tensor) -> None:
        """Take note of an optimizer step's gradients. Doesn't wait for the device. Args: norms: of each of the groups' parameters; [n]."""
        if not self._is_over:
            self._moved |= norms != 0

    def stepped(self) -> None:
        """After an optimizer step at learning rates above 0. Raises RunError at the last step that is watched."""
        self._steps += 1
        if self._steps >= _STEPS and not self._is_over:
            self._check()

    def run_ended(self) -> None:
        """Raises RunError too, for runs that were too short to be checked before."""
        if self._steps >= _LEAST and not self._is_over:
            self._check()

    def _check(self) -> None:
        self._is_over = True
        empty = [not parameter.numel() for parameter in self._parameters.values()]  # all of it lies on other processes
        changed = [*map(operator.or_, (checksums(self._parameters.values()) != self._start).tolist(), empty)]
        without = _modules_where(self._parameters, self._moved[self._watched].tolist())
        unchanged = _modules_where(self._parameters, changed)
        if without:
            raise RunError(
                f"{_some(without)} got no gradient in {self._steps} steps: the loss doesn't depend on them, so they learn nothing. "
                "Leave them out, or look at masks and weights that make the loss zero"
            )
        if unchanged:
            raise RunError(
                f"{_some(unchanged)} are what they were before {self._steps} steps, though they got gradients: the learning rate is too "
                "low for their dtype; raise it, take --rounding stochastic, or train in float32"
            )


def checksums(tensors: Iterable[Tensor]) -> Tensor:
    """One whole number for each tensor: the sum of its numbers' bits, the same in any order: [n], int64."""
    found = [tensor.detach() for tensor in tensors]
    if not found:
        return torch.zeros(0, dtype=torch.int64)
    sums = [tensor.view(_BITS[tensor.element_size()]).sum(dtype=torch.int64) for tensor in found]
    return torch.stack([one.to(sums[0].device) for one in sums])  # some may lie in RAM


def check_equal(parameters: Mapping[str, Tensor], processes: int, step: int) -> None:
    """See that all processes have the same weights. Raises RunError on each of them if not."""
    if processes == 1:
        return
    own = checksums(parameters.values())
    gathered = [torch.empty_like(own) for _ in range(processes)]
    torch.distributed.all_gather(gathered, own)
    different = (torch.stack(gathered) != own).any(dim=0).tolist()
    if any(different):
        names = [name for name, differs in zip(parameters, different, strict=True) if differs]
        raise RunError(
            f"step {step}: the processes have different weights: {_some(names)}. Their gradients weren't exchanged; nothing was saved. "
            "Please report this with the launch command"
        )


def _modules_where(parameters: Mapping[str, nn.Parameter], is_well: Sequence[bool]) -> list[str]:
    """The layers none of whose parameters is well."""
    well: dict[str, bool] = {}
    for name, one in zip(parameters, is_well, strict=True):
        layer = name.rpartition(".")[0] or name
        well[layer] = well.get(layer, False) or one
    return [layer for layer, one in well.items() if not one]


def _some(names: Sequence[str]) -> str:
    return f"{len(names)} of what is trained ({', '.join(names[:_SHOWN])}{', …' if len(names) > _SHOWN else ''})"
