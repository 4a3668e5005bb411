"""Counting the bytes of tensors that are alive, from the calls that make them."""

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """While it is entered: the bytes of all storages on a device that calls have made and that aren't freed yet.

    Attributes:
        now, peak: bytes.
    """

    def __init__(self, device: str = "cpu"):
        super().__init__()
        self.now = self.peak = 0
        self._device = device
        self._alive: dict[int, weakref.ref] = {}
        self._left_out: weakref.WeakSet[Any] = weakref.WeakSet()

    def leave_out(self, *tensors: Tensor) -> None:
        """Tensors that lie elsewhere, as far as this count goes."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._left_out.add(storage)
            if id(storage) in self._alive:
                del self._alive[id(storage)]
                self.now -= storage.nbytes()

    def count(self, *tensors: Tensor) -> None:
        """Tensors that were there before."""
        for tensor in tensors:
            self._note(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._note(leaf)
        return result

    def _note(self, tensor: Tensor) -> None:
        if tensor.device.type != self._device:
            return
        storage = tensor.untyped_storage()
        if id(storage) in self._alive or storage in self._left_out:
            return
        key, size = id(storage), storage.nbytes()

        def freed(_: object) -> None:
            if self._alive.pop(key, None) is not None:
                self.now -= size

        self._alive[key] = weakref.ref(storage, freed)
        self.now += size
        self.peak = max(self.peak, self.now)
