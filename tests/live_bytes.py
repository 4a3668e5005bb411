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
        if id(storage) in self._alive:
            return
        key, size = id(storage), storage.nbytes()

        def freed(_: object) -> None:
            del self._alive[key]
            self.now -= size

        self._alive[key] = weakref.ref(storage, freed)
        self.now += size
        self.peak = max(self.peak, self.now)
