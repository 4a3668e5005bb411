"""Activation checkpointing: how the U-Net's activations are kept for backward: in VRAM, recomputed, or offloaded to RAM.

    policy      keeps                                       recomputes                 (--checkpoint_policy)
    None        everything                                  nothing
    selective   outputs of matrix products and attention    norms, SiLU, GEGLU's product
    full        the inputs of residual and transformer      everything inside them
                blocks

With `home`, kept tensors leave the device until backward needs them (--cpu_offload_checkpointing). The results are
bit-equal: the same kernels run again on the same inputs.

Source: Chen et al. 2016, arXiv:1604.06174 (full); Korthikanti et al. 2022, arXiv:2205.05198 (selective).
"""

from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from library.models.memory.block_swap import BlockSwapper
from library.offload import OffloadStream, PendingCopy

_LEAST_BYTES = 1 << 20  # smaller tensors stay: moving them costs more than it frees


@dataclass(frozen=True)
class ActivationPolicy:
    """What happens to activations between forward and backward.

    Attributes:
        policy: None, "selective" or "full".
        home: the device that they are offloaded to; None: they stay.
    """

    policy: str | None = None
    home: torch.device | None = None


KEPT = ActivationPolicy()


class ActivationStore:
    """Runs the U-Net's blocks, and handles what autograd saves during its forward.

    Attributes:
        streamer: swaps the blocks that aren't always on the device.
    """

    def __init__(self, how: ActivationPolicy, cheap: Iterable[nn.Module]):
        """Prepare the policy.

        Args:
            how: the policy.
            cheap: modules whose outputs are recomputed with "selective".
        """
        self.how = how
        self._again: MutableMapping[Any, _Recomputed] = (
            WeakKeyDictionary()
        )  # by the storage that the result has
        self._away: MutableMapping[Any, tuple[object, _Offloaded]] = (
            WeakKeyDictionary()
        )  # by storage, with the layout in it
        self.streamer: BlockSwapper | None = None
        self._stream: OffloadStream | None = None
        self._last: ref[_Offloaded] | None = None
        for module in cheap if how.policy == "selective" else ():
            module.register_forward_hook(self._note)

    def run(self, block: nn.Module, *arguments: Any) -> Tensor:
        """Return block(*arguments); with the policy "full", backward computes it again."""
        if self.how.policy == "full" and torch.is_grad_enabled():
            return checkpoint(self._compute, block, *arguments, use_reentrant=False)
        return self._compute(block, *arguments)

    def _compute(self, block: nn.Module, *arguments: Any) -> Tensor:
        return block(*arguments) if self.streamer is None else self.streamer.run(block, *arguments)

    @contextmanager
    def saved(self, device: torch.device) -> Iterator[None]:
        """Context manager around a forward pass on this device."""
        if not torch.is_grad_enabled() or (
            self.how.policy != "selective" and self.how.home is None
        ):
            yield
            return
        if self.how.home is not None and (self._stream is None or self._stream.device != device):
            self._stream = OffloadStream(self.how.home, device)
        self._last = None
        with saved_tensors_hooks(self._pack, _unpack):
            yield

    def _note(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Note the output of a cheap module, which is recomputed instead of saved."""
        if torch.is_grad_enabled() and output.requires_grad:
            self._again[output.untyped_storage()] = _Recomputed(
                module.forward, [self._pack(tensor) for tensor in inputs]
            )

    def _pack(self, tensor: Tensor) -> "Tensor | _Saved":
        if isinstance(tensor, nn.Parameter):
            return tensor
        storage, layout = tensor.untyped_storage(), _layout(tensor)
        if (again := self._again.get(storage)) is not None:
            return _Saved(again, layout)
        is_weight = isinstance(tensor._base, nn.Parameter)
        if (
            self._stream is None
            or is_weight
            or tensor.device != self._stream.device
            or tensor.nbytes < _LEAST_BYTES
        ):
            return tensor.detach()  # the tensor itself would keep its autograd node alive
        known, away = self._away.get(storage, (None, None))
        if away is None or known != layout:
            away = _Offloaded(self._stream, tensor, self._last)
            self._away[storage], self._last = (layout, away), ref(away)
        return _Saved(away)


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.storage_offset()


def _unpack(kept: "Tensor | _Saved") -> Tensor:
    return kept if isinstance(kept, Tensor) else kept.tensor()


class _Absent:
    """A saved tensor that doesn't exist until backward needs it, and then until its last use."""

    def __init__(self) -> None:
        self.waiting = 0
        self._tensor: Tensor | None = None

    def take(self) -> Tensor:
        tensor = self._bring() if self._tensor is None else self._tensor
        self.waiting -= 1
        self._tensor = tensor if self.waiting > 0 else None
        return tensor

    def _bring(self) -> Tensor:
        raise NotImplementedError


class _Recomputed(_Absent):
    """An output that is recomputed."""

    def __init__(self, function: Callable[..., Tensor], inputs: "Sequence[Tensor | _Saved]"):
        super().__init__()
        self._function, self._inputs = function, inputs

    @torch.no_grad()
    def _bring(self) -> Tensor:
        return self._function(*map(_unpack, self._inputs))


class _Offloaded(_Absent):
    """A tensor in RAM. When it is needed, the copy of the tensor offloaded before it is started too."""

    def __init__(self, stream: OffloadStream, tensor: Tensor, before: "ref[_Offloaded] | None"):
        super().__init__()
        self._stream, self._before = stream, before
        # The stretch of memory that it occupies, so that it returns with the same layout, which selects kernels.
        self._shape, self._stride = tensor.shape, tensor.stride()
        reach = 1 + sum(
            (size - 1) * step for size, step in zip(self._shape, self._stride, strict=True)
        )
        stretch = tensor.detach().as_strided((reach,), (1,))
        self._place = stream.empty_on_cpu(stretch)
        stream.offload(stretch, self._place)
        self._coming: PendingCopy | None = None

    def come(self) -> PendingCopy:
        if self._coming is None:
            self._coming = self._stream.fetch(self._place)
        return self._coming

    def _bring(self) -> Tensor:
        stretch, self._coming = self.come().tensor(), None
        before = None if self._before is None else self._before()
        if before is not None and before.waiting:
            before.come()
        return stretch.as_strided(self._shape, self._stride)


class _Saved:
    """What autograd saves instead of an absent tensor, or of a view of it."""

    def __init__(self, absent: _Absent, layout: tuple[Any, ...] | None = None):
        self._absent, self._layout = absent, layout
        absent.waiting += 1

    def tensor(self) -> Tensor:
        tensor = self._absent.take()
        return tensor if self._layout is None else tensor.as_strided(*self._layout)
