"""Caches of text encoder outputs, in RAM or on disk, and which variants of captions they hold.

On disk they are .npz files as sd-scripts writes them (contract: formats.md section 2), with a
fingerprint of what they were made from.
"""

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from library.data.cache.disk import (
    NOT_THERE,
    VERSION,
    DiskCache,
    damage_reason,
    fingerprint_difference,
    read_arrays,
    shape_difference,
)
from library.data.cache.npz import NpzError
from library.data.captions import caption_variants
from library.data.file_index import FileIndex
from library.data.samples import Sample
from library.models.text_encoders import EncodedText
from library.rng import python_rng


@dataclass(frozen=True)
class CaptionVariants:
    """Which texts of each caption are encoded.

    Attributes:
        count: number of random variants of each caption (--text_cache_variants). None means one,
            the caption as the settings of its subset make it.
    """

    count: int | None = None

    def texts(self, sample: Sample) -> tuple[str, ...]:
        """Return the sample's texts. The empty one is last where captions are dropped."""
        settings = sample.subset.captions
        rngs = _variant_rngs(sample.caption)
        variants = caption_variants(sample.caption, settings, self.count or 1, rngs)
        return (*variants, "") if settings.drops_captions else variants

    def pick(self, sample: Sample, rng: random.Random, *, dropped: bool) -> tuple[int, str]:
        """Return the text that a step uses, and its index.

        Args:
            sample: the sample.
            rng: its random number generator.
            dropped: whether the step drops the caption, which makes it empty.
        """
        texts = self.texts(sample)
        if dropped:
            index = len(texts) - 1
        elif sample.subset.captions.drops_captions:
            index = rng.randrange(len(texts) - 1)
        else:
            index = rng.randrange(len(texts))
        return index, texts[index]


def _variant_rngs(caption: str) -> Iterator[random.Random]:
    """Yield the variants' random number generators.

    They depend on the caption alone, so that caches are valid for runs of any seed.
    """
    index = 0
    while True:
        yield python_rng("caption variant", caption, index)
        index += 1


class TextCache(Protocol):
    """Text encoder outputs of each sample's texts, without the batch dimension."""

    in_memory: bool

    @property
    def variants(self) -> CaptionVariants: ...

    def invalid_reason(self, sample: Sample) -> str | None:
        """Return why there are no valid outputs of the sample; None if there are."""
        ...

    def has(self, sample: Sample) -> bool:
        """Return whether there are outputs, valid or not, which is quick to see after filling."""
        ...

    def read(self, sample: Sample, index: int) -> EncodedText:
        """Return the outputs of one of the sample's texts."""
        ...

    def write(self, sample: Sample, encoded: Sequence[EncodedText]) -> None:
        """Store the outputs of all of the sample's texts."""
        ...


class TextInMemory:
    """A cache in RAM. It is kept by text, so that equal captions take no additional memory."""

    in_memory = True

    def __init__(self, variants: CaptionVariants):
        self.variants = variants
        self._encoded: dict[str, EncodedText] = {}

    def invalid_reason(self, sample: Sample) -> str | None:
        return None if self.has(sample) else "not encoded yet"

    def has(self, sample: Sample) -> bool:
        return all(text in self._encoded for text in self.variants.texts(sample))

    def read(self, sample: Sample, index: int) -> EncodedText:
        return self._encoded[self.variants.texts(sample)[index]]

    def write(self, sample: Sample, encoded: Sequence[EncodedText]) -> None:
        self._encoded |= zip(self.variants.texts(sample), encoded, strict=True)


# Names of the arrays in files. Those of the first text are the names that sd-scripts uses.
_ARRAYS = ("hidden_state1", "hidden_state2", "pool2")


class TextOnDisk(DiskCache):
    """A cache in one file for each sample, NAME_te_outputs.npz."""

    def __init__(
        self,
        num_tokens: int,
        widths: tuple[int, int] | None = None,
        encoders: str = "",
        variants: CaptionVariants | None = None,
        file_index: FileIndex | None = None,
        *,
        trusted: bool = False,
    ):
        """Create a cache.

        Args:
            num_tokens: tokens including start and end token (77, 152 or 227).
            widths: widths of the two encoders' hidden states. None means any.
            encoders: identifies the encoders and their dtype.
            variants: which texts of captions are encoded.
            file_index: what is known of files from earlier runs.
            trusted: every existing file counts as valid (--skip_cache_check).
        """
        super().__init__(file_index, trusted=trusted)
        self.variants = variants or CaptionVariants()
        self._num_tokens = num_tokens
        self._widths = widths or (None, None)
        self._encoders = encoders

    def invalid_reason(self, sample: Sample) -> str | None:
        if self._trusted:
            return None if self.has(sample) else NOT_THERE
        try:
            contents, _ = self._contents(sample.text_file)
        except FileNotFoundError:
            return NOT_THERE
        except (OSError, NpzError) as error:
            return damage_reason(error)
        texts = self.variants.texts(sample)
        difference = shape_difference(contents, self._shapes(len(texts)))
        if difference is not None:
            return difference
        if contents.fingerprint is None:
            return "not ours, so its pooled vector may be wrong (see docs/differences.md)"
        return fingerprint_difference(contents.fingerprint, self._fingerprint(texts))

    def has(self, sample: Sample) -> bool:
        return sample.text_file.exists()

    def _shapes(self, count: int) -> dict[str, tuple[int | None, ...]]:
        width_1, width_2 = self._widths
        shapes = ((self._num_tokens, width_1), (self._num_tokens, width_2), (width_2,))
        expected: dict[str, tuple[int | None, ...]] = {}
        for i in range(count):
            expected |= zip(_array_names(i), shapes, strict=True)
        return expected

    def _fingerprint(self, texts: Sequence[str]) -> dict[str, Any]:
        return {
            "version": VERSION,
            "captions": [_hash(text) for text in texts],
            "tokens": self._num_tokens,
            "encoders": self._encoders,
        }

    def read(self, sample: Sample, index: int) -> EncodedText:
        arrays = read_arrays(sample.text_file, _array_names(index))
        return EncodedText(*arrays.values())

    def write(self, sample: Sample, encoded: Sequence[EncodedText]) -> None:
        arrays = {}
        for i, outputs in enumerate(encoded):
            for name, tensor in zip(_array_names(i), outputs, strict=True):
                if tensor.dtype == torch.bfloat16:  # numpy has no such type
                    tensor = tensor.float()
                arrays[name] = tensor.numpy()
        self._write(sample.text_file, arrays, self._fingerprint(self.variants.texts(sample)))


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def _array_names(index: int) -> list[str]:
    """Return the names of the arrays of one text."""
    return [f"{name}_{index}" if index else name for name in _ARRAYS]
