"""Sanity checks: trained parameters receive gradients and change, and all ranks stay equal."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from library.errors import RunError
from library.param_group import ParamGroup

_STEPS = 50  # after which every trained parameter must have received a gradient and changed
# Steps of a shorter run that is still checked: a LoRA's down projection has no gradient at first.
_MIN_STEPS = 10
_MAX_SHOWN = 5
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class GradientFlowCheck:
    """Checks the first steps of a run: every parameter must receive a gradient and change."""

    def __init__(self, groups: Sequence[ParamGroup], done: int = 0):
        """Remember the values of the parameters.

        Args:
            groups: what is trained. Groups that stop too early for the check are left out.
            done: the step at which the run starts, which may be after the last one of a group.
        """
        self._parameters: dict[str, nn.Parameter] = {}
        is_checked: list[bool] = []  # of each parameter of all groups
        for group in groups:
            lasts = group.last_step is None or group.last_step - done > _STEPS
            is_checked += [lasts] * len(group.parameters)
            if lasts:
                self._parameters |= group.parameters
        self._checksums = checksums(self._parameters.values())
        self._is_checked = torch.tensor(is_checked, dtype=torch.bool, device=self._checksums.device)
        self._has_gradient = torch.zeros_like(self._is_checked)
        self._steps = 0
        self._is_over = not self._parameters

    def note_gradients(self, norms: Tensor) -> None:
        """Record which parameters have received gradients. Doesn't wait for the device.

        Args:
            norms: gradient norms of all parameters of the groups, [n].
        """
        if not self._is_over:
            self._has_gradient |= norms != 0

    def step_done(self) -> None:
        """Count an optimizer step at learning rates above 0.

        Raises RunError at the last checked step if a check fails.
        """
        self._steps += 1
        if self._steps >= _STEPS and not self._is_over:
            self._check()

    def run_ended(self) -> None:
        """Check a run that was too short to be checked before. Raises RunError if a check fails."""
        if self._steps >= _MIN_STEPS and not self._is_over:
            self._check()

    def _check(self) -> None:
        self._is_over = True
        without_gradient = _modules_without(
            self._parameters, self._has_gradient[self._is_checked].tolist()
        )
        if without_gradient:
            raise RunError(
                f"{_format_modules(without_gradient)} received no gradient in {self._steps} steps: "
                "the loss doesn't depend on them, so they learn nothing. Leave them out, or check for "
                "masks and weights that make the loss zero"
            )
        unchanged = _modules_without(self._parameters, self._changed())
        if unchanged:
            raise RunError(
                f"{_format_modules(unchanged)} have not changed after {self._steps} steps although "
                "they received gradients: updates are too small for their dtype. Use a higher learning "
                "rate, --rounding stochastic, or float32"
            )

    def _changed(self) -> list[bool]:
        """Return which parameters have changed. A shard without elements counts as changed."""
        has_new_checksum = (checksums(self._parameters.values()) != self._checksums).tolist()
        changed = []
        for parameter, is_new in zip(self._parameters.values(), has_new_checksum, strict=True):
            changed.append(is_new or parameter.numel() == 0)
        return changed


def checksums(tensors: Iterable[Tensor]) -> Tensor:
    """Return the sum of the bit patterns of each tensor's elements: [n], int64."""
    sums = []
    for tensor in tensors:
        bits = tensor.detach().view(_BITS[tensor.element_size()])
        sums.append(bits.sum(dtype=torch.int64))
    if not sums:
        return torch.zeros(0, dtype=torch.int64)
    return torch.stack([value.to(sums[0].device) for value in sums])  # some tensors may be in RAM


def check_ranks_in_sync(parameters: Mapping[str, Tensor], world_size: int, step: int) -> None:
    """Check that all ranks have the same weights. Raises RunError on each of them if not."""
    if world_size == 1:
        return
    local = checksums(parameters.values())
    gathered = [torch.empty_like(local) for _ in range(world_size)]
    torch.distributed.all_gather(gathered, local)
    differs = (torch.stack(gathered) != local).any(dim=0).tolist()
    names = [name for name, is_different in zip(parameters, differs, strict=True) if is_different]
    if names:
        raise RunError(
            f"step {step}: the processes have different weights in "
            f"{_format_modules(names, 'tensors')}. Their gradients were not averaged; nothing was "
            "saved. Please report this with the launch command"
        )


def _modules_without(parameters: Mapping[str, nn.Parameter], passed: Sequence[bool]) -> list[str]:
    """Return the modules none of whose parameters has passed."""
    modules: dict[str, bool] = {}
    for name, has_passed in zip(parameters, passed, strict=True):
        module = name.rpartition(".")[0] or name
        modules[module] = modules.get(module, False) or has_passed
    return [module for module, has_passed in modules.items() if not has_passed]


def _format_modules(names: Sequence[str], kind: str = "trained modules") -> str:
    shown = list(names[:_MAX_SHOWN])
    if len(names) > _MAX_SHOWN:
        shown.append("…")
    return f"{len(names)} {kind} ({', '.join(shown)})"
