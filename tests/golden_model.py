"""The tiny SDXL of the golden numbers, rebuilt from its int8 core (golden/INDEX.md, "The tiny SDXL")."""

import gzip
import hashlib
import json
import tempfile
from pathlib import Path

import numpy as np
import torch

from library.models.sdxl import SdxlModels
from library.models.text_encoders import module_name
from library.safetensors_io import load_tensors, write_safetensors

GOLDEN = Path(__file__).parent / "golden"

_EMBEDDINGS = {  # key -> width, salt
    "conditioner.embedders.0.transformer.text_model.embeddings.token_embedding.weight": (64, 0),
    "conditioner.embedders.1.model.token_embedding.weight": (128, 1_000_000_007),
}
_SHA256 = "b5112ef6a3b059f5115f4c47e2acf0458e54da67387ff4b2b8af1b156efee26c"


def golden_checkpoint() -> dict[str, torch.Tensor]:
    """The float32 tensors of the checkpoint, by single-file keys."""
    core, metadata = _load_packed(GOLDEN / "00_tiny_core_int8.safetensors.gz")
    exponents = json.loads(metadata["exponents"])
    tensors = {key: tensor.float() * 2.0 ** -exponents[key] for key, tensor in core.items()}
    for key, (width, salt) in _EMBEDDINGS.items():
        tensors[key] = torch.from_numpy(_hashed(49408 * width, salt)).view(49408, width)
    digest = hashlib.sha256()
    for key in sorted(tensors):
        digest.update(key.encode())
        digest.update(tensors[key].contiguous().numpy().tobytes())
    assert digest.hexdigest() == _SHA256, "the golden checkpoint wasn't rebuilt exactly"
    return tensors


def _load_packed(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors and metadata of a compressed safetensors file."""
    with tempfile.TemporaryDirectory() as folder:
        unpacked = Path(folder) / path.stem
        unpacked.write_bytes(gzip.decompress(path.read_bytes()))
        return load_tensors(unpacked)


def _hashed(count: int, salt: int) -> np.ndarray:
    """An integer hash of 0.. as values in -1..1; unsigned 32-bit arithmetic that wraps around."""
    n = (np.arange(count, dtype=np.uint64) + salt).astype(np.uint32)
    n = n * np.uint32(747796405) + np.uint32(2891336453)
    n = (n >> ((n >> np.uint32(28)) + np.uint32(4))) ^ n
    n = n * np.uint32(277803737)
    n = (n >> np.uint32(22)) ^ n
    return (((n >> np.uint32(16)).astype(np.float64) - 32767.5) / 32768).astype(np.float32)


def write_golden_checkpoint(path: Path) -> Path:
    write_safetensors(path, golden_checkpoint(), {"format": "pt"})
    return path


def live_tensors(models: SdxlModels) -> dict[str, dict[str, torch.Tensor]]:
    """The tensors of the loaded modules by part, under the names that checkpoints' tensors() gives them."""
    tensors = {"unet": models.unet.state_dict(), "vae": models.vae.state_dict()}
    for i, encoder in enumerate(models.text_encoders, 1):
        state = encoder.state_dict()
        tensors[f"text_encoder_{i}"] = {
            module_name(encoder, name): tensor for name, tensor in state.items()
        }
    return tensors
