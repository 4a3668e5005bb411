"""Block swap: some of the U-Net's blocks are kept in RAM, and copied to the GPU while they run (--blocks_to_swap).

Blocks are prefetched: the next one in forward, the previous one in backward. With full checkpointing a block is recomputed in
backward, and its weights stay on the GPU until the next block's turn, so an optimizer step within backward changes them there;
changed weights are copied back.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from library import param_group
from library.offload import OffloadStream, PendingCopy


class BlockSwapper:
    """Keeps blocks on the compute device only while they are in use. Between steps their weights are in RAM."""

    def __init__(self, blocks: Sequence[nn.Module], stream: OffloadStream):
        """Move the large tensors of the blocks to RAM.

        Args:
            blocks: the blocks in the order of a forward pass.
            stream: copies between RAM and the device.
        """
        self._stream = stream
        self._indices = {id(block): index for index, block in enumerate(blocks)}
        # Small tensors stay: they are a thousandth of the weights, and steps within backward handle them together.
        self._tensors = [
            [
                tensor
                for tensor in (*block.parameters(), *block.buffers())
                if tensor.numel() >= param_group.SMALL
            ]
            for block in blocks
        ]
        self._coming: dict[int, list[_SwappedTensor]] = {}
        self._here: dict[int, list[_SwappedTensor]] = {}
        self._is_ending = False
        for tensors in self._tensors:
            for tensor in tensors:
                place = stream.empty_on_cpu(tensor)
                place.copy_(tensor.detach())
                tensor.data = place

    @property
    def tensors(self) -> set[int]:
        """The ids of the tensors that are swapped."""
        return {id(tensor) for tensors in self._tensors for tensor in tensors}

    def run(self, block: nn.Module, *arguments: Any) -> Tensor:
        """Return block(*arguments), computed with its weights on the device."""
        index = self._indices.get(id(block))
        if index is None:
            return block(*arguments)
        in_backward = torch._C._current_graph_task_id() != -1
        if in_backward:
            self._unload_at_end()
            self._unload(but=index)  # the blocks whose backward is done
        self._load(index, then=index - 1 if in_backward else index + 1)
        if in_backward:
            return block(*arguments)  # its backward follows
        result = block(*arguments)
        # The last block is the first one in backward.
        if not torch.is_grad_enabled() or index < len(self._tensors) - 1:
            self._unload()
        return result

    def _load(self, index: int, then: int) -> None:
        """Wait for the weights of a block, and start to copy those of another one."""
        if index not in self._here:
            swapped = self._coming.pop(index, None) or self._fetch(index)
            self._coming.clear()
            for tensor_copy in swapped:
                tensor_copy.tensor.data = tensor_copy.copy.tensor()
            self._here[index] = swapped
        if 0 <= then < len(self._tensors) and then not in self._here:
            self._coming[then] = self._fetch(then)

    def _fetch(self, index: int) -> "list[_SwappedTensor]":
        return [
            _SwappedTensor(tensor, tensor.data, self._stream.fetch(tensor.data))
            for tensor in self._tensors[index]
        ]

    def _unload(self, but: int | None = None) -> None:
        """Move the loaded blocks back to RAM, with their changes if they are trained.

        Args:
            but: the block that stays.
        """
        for index in [index for index in self._here if index != but]:
            for tensor, home, _ in self._here.pop(index):
                if tensor.requires_grad and torch._C._current_graph_task_id() != -1:
                    self._stream.offload(tensor.data, home)
                tensor.data = home

    def _unload_at_end(self) -> None:
        """Register, once per backward, that the loaded blocks move back to RAM at its end."""
        if not self._is_ending:
            self._is_ending = True
            torch.autograd.Variable._execution_engine.queue_callback(self._backward_ended)

    def _backward_ended(self) -> None:
        self._is_ending = False
        self._unload()
        self._coming.clear()
        self._stream.wait()


class _SwappedTensor(NamedTuple):
    """A tensor of a loaded block, its memory in RAM, and its copy on the device."""

    tensor: Tensor
    home: Tensor
    copy: PendingCopy


def largest_blocks(blocks: Sequence[nn.Module], count: int) -> list[nn.Module]:
    """Return the `count` largest blocks in their order; of equal ones an evenly spaced selection, so that copies have time."""
    sizes = [
        sum(tensor.nbytes for tensor in (*block.parameters(), *block.buffers())) for block in blocks
    ]
    selected: list[int] = []
    for size in sorted(set(sizes), reverse=True):
        equal = [i for i, other in enumerate(sizes) if other == size]
        room = count - len(selected)
        if len(equal) > room:
            equal = [equal[i * len(equal) // room] for i in range(room)]
        selected += equal
    return [blocks[i] for i in sorted(selected)]
