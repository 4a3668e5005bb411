"""A hash of weights, by which caches detect whether they were made by the same model, whatever file stores it."""

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

_THREADS = 4


def weights_hash(tensors: Mapping[str, Tensor]) -> str:
    """Return a hash of the names, dtypes, shapes and all bytes. Tensors are hashed in parallel, as a text encoder has gigabytes."""
    names = sorted(tensors)
    with ThreadPoolExecutor(_THREADS) as pool:
        digests = list(pool.map(lambda name: _digest(tensors[name]), names))
    total = hashlib.sha256()
    for name, digest in zip(names, digests, strict=True):
        tensor = tensors[name]
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {digest};".encode())
    return total.hexdigest()[:32]


def _digest(tensor: Tensor) -> str:
    flat = tensor.detach().contiguous().reshape(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().data).hexdigest() if flat.numel() else ""
