"""Streaming: some of the U-Net's blocks lie in RAM, and visit the GPU while something is computed with them (--blocks_to_swap).

Blocks come ahead of their use: in a forward the next one, in backward the one before. With full checkpointing a block is
computed again in backward, and its weights stay from then on until the next block's turn, so a step that is taken within
backward changes them on the GPU; they go home changed.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from library import param_group
from library.offload import OffloadStream, PendingCopy


class BlockSwapper:
    """Blocks that are on the work device only while they are in use. Between steps their weights are at home."""

    def __init__(self, blocks: Sequence[nn.Module], lane: OffloadStream):
        """Send the blocks' large tensors home. Args: blocks: in the order in which a forward comes to them."""
        self._lane = lane
        self._numbers = {id(block): number for number, block in enumerate(blocks)}
        # Small tensors stay: they are a thousandth of the numbers, and fused steps take them together.
        self._tensors = [
            [tensor for tensor in (*block.parameters(), *block.buffers()) if tensor.numel() >= param_group.SMALL]
            for block in blocks
        ]
        self._coming: dict[int, list[_SwappedTensor]] = {}
        self._here: dict[int, list[_SwappedTensor]] = {}
        self._is_ending = False
        for tensors in self._tensors:
            for tensor in tensors:
                place = lane.empty_on_cpu(tensor)
                place.copy_(tensor.detach())
                tensor.data = place

    @property
    def tensors(self) -> set[int]:
        """The ids of those that are streamed."""
        return {id(tensor) for tensors in self._tensors for tensor in tensors}

    def run(self, block: nn.Module, *arguments: Any) -> Tensor:
        """block(*arguments), with its weights on the work device."""
        number = self._numbers.get(id(block))
        if number is None:
            return block(*arguments)
        in_backward = torch._C._current_graph_task_id() != -1
        if in_backward:
            self._see_to_the_end()
            self._leave(but=number)  # those whose backward is behind us
        self._arrive(number, then=number - 1 if in_backward else number + 1)
        if in_backward:
            return block(*arguments)  # its backward follows
        result = block(*arguments)
        # The last block is the first one in backward.
        if not torch.is_grad_enabled() or number < len(self._tensors) - 1:
            self._leave()
        return result

    def _arrive(self, number: int, then: int) -> None:
        """Bring a block, and begin to bring another one."""
        if number not in self._here:
            guests = self._coming.pop(number, None) or self._fetch(number)
            self._coming.clear()
            for guest in guests:
                guest.tensor.data = guest.copy.tensor()
            self._here[number] = guests
        if 0 <= then < len(self._tensors) and then not in self._here:
            self._coming[then] = self._fetch(then)

    def _fetch(self, number: int) -> "list[_SwappedTensor]":
        return [_SwappedTensor(tensor, tensor.data, self._lane.fetch(tensor.data)) for tensor in self._tensors[number]]

    def _leave(self, but: int | None = None) -> None:
        """Send home what is here: changed, if it is trained. Args: but: the block that stays."""
        for number in [number for number in self._here if number != but]:
            for tensor, home, _ in self._here.pop(number):
                if tensor.requires_grad and torch._C._current_graph_task_id() != -1:
                    self._lane.offload(tensor.data, home)
                tensor.data = home

    def _see_to_the_end(self) -> None:
        """Once in each backward: what is here at its end goes home, and is there before anyone looks at it."""
        if not self._is_ending:
            self._is_ending = True
            torch.autograd.Variable._execution_engine.queue_callback(self._backward_ended)

    def _backward_ended(self) -> None:
        self._is_ending = False
        self._leave()
        self._coming.clear()
        self._lane.wait()


class _SwappedTensor(NamedTuple):
    """A tensor of a visiting block, its memory at home, and the copy on the work device."""

    tensor: Tensor
    home: Tensor
    copy: PendingCopy


def largest_blocks(blocks: Sequence[nn.Module], count: int) -> list[nn.Module]:
    """The `count` largest, in their order; among equals those that lie evenly between the others, so that copies have time."""
    sizes = [sum(tensor.nbytes for tensor in (*block.parameters(), *block.buffers())) for block in blocks]
    chosen: list[int] = []
    for size in sorted(set(sizes), reverse=True):
        equal, room = [i for i, own in enumerate(sizes) if own == size], count - len(chosen)
        chosen += equal if len(equal) <= room else [equal[i * len(equal) // room] for i in range(room)]
    return [blocks[i] for i in sorted(chosen)]
