"""Caches of latents and text-encoder outputs: where they lie, whether they are valid, reading and writing.

On disk they are the reference's .npz files (contract: formats.md sections 1 and 2); in memory, dictionaries. A file is
written beside its place and moved, so that it is whole at any moment.
"""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from library.data.sample import Sample
from library.models.text_encoders import EncodedText
from library.models.vae import PIXELS_PER_LATENT
from library.safetensors_io import write_atomically

LATENT_CHANNELS = 4


class Latents(NamedTuple):
    """Raw latents of a picture and, with flip_aug, of its mirror image: [4, H/8, W/8], float32 each."""

    plain: Tensor
    flipped: Tensor | None


class LatentCache(Protocol):
    """Raw latents by sample."""

    in_memory: bool

    def problem(self, sample: Sample) -> str | None:
        """Why there are no valid latents of the sample; None if there are."""
        ...

    def read(self, sample: Sample) -> Latents: ...
    def write(self, sample: Sample, latents: Latents) -> None: ...


class TextCache(Protocol):
    """Text-encoder outputs by sample: one sample's, without the batch dimension."""

    in_memory: bool

    def problem(self, sample: Sample) -> str | None: ...
    def read(self, sample: Sample) -> EncodedText: ...
    def write(self, sample: Sample, text: EncodedText) -> None: ...


class LatentsInMemory:
    in_memory = True

    def __init__(self) -> None:
        self._kept: dict[Path, Latents] = {}

    def problem(self, sample: Sample) -> str | None:
        return None if sample.cache_stem in self._kept else "not encoded yet"

    def read(self, sample: Sample) -> Latents:
        return self._kept[sample.cache_stem]

    def write(self, sample: Sample, latents: Latents) -> None:
        self._kept[sample.cache_stem] = latents


class LatentsOnDisk:
    in_memory = False

    def problem(self, sample: Sample) -> str | None:
        shape = (
            LATENT_CHANNELS,
            sample.fit.bucket.height // PIXELS_PER_LATENT,
            sample.fit.bucket.width // PIXELS_PER_LATENT,
        )
        wanted = {"latents": shape} | ({"latents_flipped": shape} if sample.subset.flip_aug else {})
        return _problem(sample.latents_file, wanted)

    def read(self, sample: Sample) -> Latents:
        arrays = _read(sample.latents_file, ("latents", "latents_flipped") if sample.subset.flip_aug else ("latents",))
        return Latents(arrays["latents"], arrays.get("latents_flipped"))

    def write(self, sample: Sample, latents: Latents) -> None:
        arrays = {
            "latents": latents.plain.numpy(),
            "original_size": np.array(sample.size, dtype=np.int64),
            "crop_ltrb": np.array(sample.crop, dtype=np.float64),
        }
        if latents.flipped is not None:
            arrays["latents_flipped"] = latents.flipped.numpy()
        _write(sample.latents_file, arrays)


class TextInMemory:
    """Kept by caption, so that repeated captions take no memory."""

    in_memory = True

    def __init__(self) -> None:
        self._kept: dict[str, EncodedText] = {}

    def problem(self, sample: Sample) -> str | None:
        return None if sample.settled_caption in self._kept else "not encoded yet"

    def read(self, sample: Sample) -> EncodedText:
        return self._kept[sample.settled_caption]

    def write(self, sample: Sample, text: EncodedText) -> None:
        self._kept[sample.settled_caption] = text


_TEXT_KEYS = ("hidden_state1", "hidden_state2", "pool2")


class TextOnDisk:
    in_memory = False

    def __init__(self, num_tokens: int):
        """Args: num_tokens: tokens with both markers (77, 152 or 227)."""
        self._num_tokens = num_tokens

    def problem(self, sample: Sample) -> str | None:
        return _problem(
            sample.text_file,
            {"hidden_state1": (self._num_tokens, None), "hidden_state2": (self._num_tokens, None), "pool2": (None,)},
        )

    def read(self, sample: Sample) -> EncodedText:
        arrays = _read(sample.text_file, _TEXT_KEYS)
        return EncodedText(*(arrays[key] for key in _TEXT_KEYS))

    def write(self, sample: Sample, text: EncodedText) -> None:
        _write(
            sample.text_file,
            {
                key: part.float().numpy() if part.dtype == torch.bfloat16 else part.numpy()
                for key, part in zip(_TEXT_KEYS, text, strict=True)
            },
        )


# -------------------------------------------------------------------------------------------------------------- .npz


def _problem(path: Path, wanted: Mapping[str, tuple[int | None, ...]]) -> str | None:
    """Why the file doesn't hold arrays of these shapes (None: any length); None if it does. Reads headers only."""
    try:
        with zipfile.ZipFile(path) as archive:
            for key, shape in wanted.items():
                with archive.open(f"{key}.npy") as member:
                    version = np.lib.format.read_magic(member)
                    reader = (
                        np.lib.format.read_array_header_1_0
                        if version == (1, 0)
                        else np.lib.format.read_array_header_2_0
                    )
                    found, _, dtype = reader(member)
                if dtype.kind != "f":
                    return f"its {key} are {dtype}, not floats"
                if len(found) != len(shape) or any(
                    want not in (None, have) for want, have in zip(shape, found, strict=True)
                ):
                    return f"its {key} are {_shape(found)} where {_shape(shape)} are needed"
    except FileNotFoundError:
        return "not there"
    except KeyError as error:
        return f"lacks {str(error).split(chr(39))[1].removesuffix('.npy')}"
    except (OSError, ValueError, zipfile.BadZipFile, EOFError, NotImplementedError) as error:
        return f"unreadable ({error})"
    return None


def _shape(shape: tuple[int | None, ...]) -> str:
    return "x".join("?" if n is None else str(n) for n in shape)


def _read(path: Path, keys: tuple[str, ...]) -> dict[str, Tensor]:
    with np.load(path, allow_pickle=False) as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in keys}


def _write(path: Path, arrays: Mapping[str, Any]) -> None:
    write_atomically(path, lambda file: np.savez(file, **arrays))
