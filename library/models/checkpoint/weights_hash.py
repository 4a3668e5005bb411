"""Identity of weights: a hash by which caches know whether they were made by the same model, whatever file holds it."""

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

_THREADS = 4


def weights_hash(tensors: Mapping[str, Tensor]) -> str:
    """A hash over names, dtypes, shapes and every byte. Tensors are hashed side by side, as a text encoder has gigabytes."""
    names = sorted(tensors)
    with ThreadPoolExecutor(_THREADS) as pool:
        digests = list(pool.map(lambda name: _digest(tensors[name]), names))
    whole = hashlib.sha256()
    for name, digest in zip(names, digests, strict=True):
        tensor = tensors[name]
        whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {digest};".encode())
    return whole.hexdigest()[:32]


def _digest(tensor: Tensor) -> str:
    flat = tensor.detach().contiguous().reshape(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().data).hexdigest() if flat.numel() else ""
