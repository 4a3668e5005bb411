"""Caches of latents and text-encoder outputs: where they lie, whether they are valid, reading and writing.

On disk they are the reference's .npz files (contract: formats.md sections 1 and 2) with a fingerprint of what they were made
of; in memory, dictionaries. A file is valid if it was made of the same things; of the same picture means: of one with the
same content, or unchanged size and time.
"""

import hashlib
import os
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from library.data.cache import npz
from library.data.cache.npz import BadFile, Contents
from library.data.captions import caption_variants
from library.data.file_index import FileIndex, FileStamp, file_stamp
from library.data.samples import Sample
from library.errors import RunError
from library.models.text_encoders import EncodedText
from library.models.vae import PIXELS_PER_LATENT
from library.rng import python_rng

LATENT_CHANNELS = 4
_VERSION = 1  # of what the fingerprint says


class Latents(NamedTuple):
    """What is kept of a picture, float32.

    Attributes:
        plain: raw latents, [4, H/8, W/8]; flipped: those of its mirror image, with flip_aug.
        mask: of the loss, from its alpha channel, [H, W] in 0..1.
        inpainting: what an inpainting model sees of a picture with a mask of its own, [5, H/8, W/8]: which cells it is to
            paint, and the raw latents of what it is shown; inpainting_flipped: of the mirror image.
    """

    plain: Tensor
    flipped: Tensor | None = None
    mask: Tensor | None = None
    inpainting: Tensor | None = None
    inpainting_flipped: Tensor | None = None

    def seen(self, *, flipped: bool) -> "Cached":
        """The picture as a batch takes it, or its mirror image."""
        latents = self.flipped if flipped else self.plain
        assert latents is not None
        inpainting = self.inpainting_flipped if flipped else self.inpainting
        return Cached(latents, _mirrored(self.mask, flipped=flipped), inpainting)


class Cached(NamedTuple):
    """Raw latents, loss mask and what an inpainting model sees, of a picture or of its mirror image; shapes as of Latents."""

    latents: Tensor
    mask: Tensor | None
    inpainting: Tensor | None


class SourceStamp(NamedTuple):
    """The picture file that latents were made of: a hash of its content, and what it looked like then; the same of its mask's."""

    content: str
    stamp: FileStamp
    mask: "SourceStamp | None" = None


def source_stamp(path: Path) -> tuple[bytes, SourceStamp]:
    """A picture file's bytes, and what to remember of them."""
    stamp = file_stamp(path)
    raw = path.read_bytes()
    return raw, SourceStamp(content_hash(raw), stamp)


def content_hash(raw: bytes) -> str:
    return hashlib.blake2b(raw, digest_size=16).hexdigest()


class LatentCache(Protocol):
    """Raw latents by sample.

    Attributes:
        for_inpainting: what inpainting models see is kept, too, of samples that have masks of their own.
    """

    in_memory: bool
    for_inpainting: bool

    def problem(self, sample: Sample) -> str | None:
        """Why there are no valid latents of the sample; None if there are."""
        ...

    def has(self, sample: Sample) -> bool:
        """Whether there are any, valid or not: a quick look after filling."""
        ...

    def read(self, sample: Sample, *, flipped: bool = False) -> Cached: ...

    def write(self, sample: Sample, latents: Latents, origin: SourceStamp) -> None: ...


class TextCache(Protocol):
    """Text-encoder outputs of each sample's captions: one text's at a time, without the batch dimension."""

    in_memory: bool

    @property
    def texts(self) -> "CaptionVariants": ...
    def problem(self, sample: Sample) -> str | None: ...
    def has(self, sample: Sample) -> bool: ...
    def read(self, sample: Sample, number: int) -> EncodedText: ...
    def write(self, sample: Sample, encoded: Sequence[EncodedText]) -> None: ...


# ---------------------------------------------------------------------------------------------------------- in memory


class LatentsInMemory:
    in_memory = True

    def __init__(self, *, for_inpainting: bool = False) -> None:
        self.for_inpainting = for_inpainting
        self._kept: dict[str, Latents] = {}

    def problem(self, sample: Sample) -> str | None:
        return None if self.has(sample) else "not encoded yet"

    def has(self, sample: Sample) -> bool:
        return sample.cache_stem in self._kept

    def read(self, sample: Sample, *, flipped: bool = False) -> Cached:
        return self._kept[sample.cache_stem].seen(flipped=flipped)

    def write(self, sample: Sample, latents: Latents, origin: SourceStamp) -> None:
        self._kept[sample.cache_stem] = latents


class TextInMemory:
    """Kept by caption, so that repeated captions take no memory."""

    in_memory = True

    def __init__(self, texts: "CaptionVariants"):
        self.texts = texts
        self._kept: dict[str, EncodedText] = {}

    def problem(self, sample: Sample) -> str | None:
        return None if self.has(sample) else "not encoded yet"

    def has(self, sample: Sample) -> bool:
        return all(text in self._kept for text in self.texts.of(sample))

    def read(self, sample: Sample, number: int) -> EncodedText:
        return self._kept[self.texts.of(sample)[number]]

    def write(self, sample: Sample, encoded: Sequence[EncodedText]) -> None:
        self._kept |= zip(self.texts.of(sample), encoded, strict=True)


# ------------------------------------------------------------------------------------------------------- which texts


class CaptionVariants(NamedTuple):
    """Which texts are encoded of each caption.

    Attributes:
        variants: so many draws of the caption (--text_cache_variants); None: the caption as its subset's settings make it.
    """

    variants: int | None = None

    def of(self, sample: Sample) -> tuple[str, ...]:
        """The sample's texts; the empty one is last where captions are dropped."""
        settings = sample.subset.captions
        drawn = caption_variants(sample.caption, settings, self.variants or 1, _variant_rngs(sample.caption))
        return (*drawn, "") if settings.drops_captions else drawn

    def choose(self, sample: Sample, draw: random.Random, *, dropped: bool) -> tuple[int, str]:
        """The text that a step uses, and its number."""
        texts = self.of(sample)
        number = len(texts) - 1 if dropped else draw.randrange(len(texts) - sample.subset.captions.drops_captions)
        return number, texts[number]


def _variant_rngs(caption: str) -> Iterator[random.Random]:
    """The variants' randomness: a function of the caption, so that caches serve runs of any seed."""
    number = 0
    while True:
        yield python_rng("caption variant", caption, number)
        number += 1


# ------------------------------------------------------------------------------------------------------------ on disk


class _OnDisk:
    """What both disk caches do: look at files once, remember what they hold."""

    in_memory = False

    def __init__(self, known: FileIndex | None = None, *, trusted: bool = False):
        """Args: known: what was found in files before. trusted: a file that is there is valid (--skip_cache_check)."""
        self._known = known or FileIndex()
        self._trusted = trusted
        self._written: dict[Path, Contents] = {}

    def settle(self) -> None:
        """Remember the files that were written, so that the next run needn't read them to know them."""
        for path, contents in self._written.items():
            self._learn(path, file_stamp(path), contents)
        self._written.clear()

    def _contents(self, path: Path) -> tuple[Contents, FileStamp]:
        """Raises FileNotFoundError; BadFile."""
        stamp = file_stamp(path)
        folder, name = os.path.split(path)
        facts = self._known.get(folder, name, stamp)
        if "npz" in facts:
            return Contents.from_json(facts["npz"]), stamp
        contents = npz.verify(path)
        self._learn(path, stamp, contents)
        return contents, stamp

    def _learn(self, path: Path, stamp: FileStamp, contents: Contents) -> None:
        folder, name = os.path.split(path)
        self._known.learn(folder, name, stamp, npz=contents.as_json())

    def _write(self, path: Path, arrays: Mapping[str, np.ndarray], fingerprint: Mapping[str, Any]) -> None:
        self._written[path] = npz.write(path, arrays, fingerprint)


class LatentsOnDisk(_OnDisk):
    def __init__(
        self,
        vae: str = "",
        known: FileIndex | None = None,
        *,
        trusted: bool = False,
        old_names: bool = False,
        for_inpainting: bool = False,
    ):
        """
        Args:
            vae: what tells this VAE and its dtype from others.
            old_names: write NAME.npz, as prepare_buckets_latents.py does; both names are read.
        """
        super().__init__(known, trusted=trusted)
        self._vae, self._old_names, self.for_inpainting = vae, old_names, for_inpainting

    def problem(self, sample: Sample) -> str | None:
        if self._trusted:
            return self._problem_of_trusted(sample)
        first = self._problem_of(sample.latents_file, sample)
        if first == "not there" and self._problem_of(sample.old_latents_file, sample) is None:
            return None
        return first

    def _problem_of_trusted(self, sample: Sample) -> str | None:
        path = self._file(sample)
        if path is None:
            return "not there"
        if not (self.for_inpainting and sample.has_mask):
            return None
        # Files from before masks were cached lack what the model sees: they are opened, and nothing but that is looked at.
        try:
            return _shape_problem(self._contents(path)[0], self._shapes(sample))
        except (OSError, BadFile):
            return "unreadable"

    def _problem_of(self, path: Path, sample: Sample) -> str | None:
        try:
            contents, stamp = self._contents(path)
        except FileNotFoundError:
            return "not there"
        except (OSError, BadFile) as error:
            return str(error) if isinstance(error, BadFile) else "unreadable"
        if reason := _shape_problem(contents, self._shapes(sample)):
            return reason
        if contents.fingerprint is None:
            return self._problem_without_fingerprint(path, stamp, contents, sample)
        if reason := _difference(contents.fingerprint, self._made_of(sample)):
            return reason
        if reason := self._file_problem(contents.fingerprint.get("picture", {}), sample.file, "picture"):
            return reason
        if self._made_of(sample).get("inpainting") == _FOLDER:
            assert sample.conditioning is not None
            return self._file_problem(contents.fingerprint.get("mask", {}), sample.conditioning, "mask")
        return None

    def has(self, sample: Sample) -> bool:
        return self._file(sample) is not None

    def _shapes(self, sample: Sample) -> dict[str, tuple[int, ...]]:
        bucket, pixels = sample.fit.bucket, sample.subset.pixels
        shape = (LATENT_CHANNELS, bucket.height // PIXELS_PER_LATENT, bucket.width // PIXELS_PER_LATENT)
        shapes: dict[str, tuple[int, ...]] = {"latents": shape}
        if pixels.flip_aug:
            shapes["latents_flipped"] = shape
        if pixels.alpha_mask:
            shapes["alpha_mask"] = (bucket.height, bucket.width)
        if self.for_inpainting and sample.has_mask:
            seen = (1 + LATENT_CHANNELS, *shape[1:])
            shapes |= {"inpainting": seen, **({"inpainting_flipped": seen} if pixels.flip_aug else {})}
        return shapes

    def _problem_without_fingerprint(
        self, path: Path, stamp: FileStamp, contents: Contents, sample: Sample
    ) -> str | None:
        """Files of sd-scripts: accepted when they are newer than the picture and were made of one of its size."""
        if stamp[1] < file_stamp(sample.file)[1]:
            return "older than its picture"
        if "original_size" in contents.arrays:
            size = npz.read(path, ["original_size"])["original_size"].ravel().tolist()
            if size != list(sample.size):
                return "made of a picture of another size"
        return None

    def _file_problem(self, origin: Mapping[str, Any], file: str, what: str) -> str | None:
        stamp = file_stamp(file)
        if (origin.get("size"), origin.get("time")) == stamp:
            return None
        folder, name = os.path.split(file)
        content = self._known.get(folder, name, stamp).get("content")
        if content is None:
            content = content_hash(Path(file).read_bytes())
            self._known.learn(folder, name, stamp, content=content)
        return None if content == origin.get("content") else f"the {what} has changed"

    def _made_of(self, sample: Sample) -> dict[str, Any]:
        fingerprint: dict[str, Any] = {
            "version": _VERSION,
            "bucket": list(sample.fit.bucket),
            "resized": list(sample.fit.resized),
            "resize_interpolation": sample.subset.pixels.resize_interpolation,
            # Pixels under a mask are the file's own; without one they are laid on white.
            "alpha_mask": sample.subset.pixels.alpha_mask,
            "vae": self._vae,
        }
        if self.for_inpainting and sample.has_mask:
            fingerprint["inpainting"] = _ALPHA if sample.subset.pixels.alpha_mask else _FOLDER
        return fingerprint

    def read(self, sample: Sample, *, flipped: bool = False) -> Cached:
        path = self._file(sample)
        if path is None:
            raise RunError(f"{sample.latents_file}: the cached latents are gone; run again to make them again")
        name = "latents_flipped" if flipped else "latents"
        seen = "inpainting_flipped" if flipped else "inpainting"
        names = [name, *(["alpha_mask"] if sample.subset.pixels.alpha_mask else [])]
        arrays = _read(path, [*names, seen] if self.for_inpainting and sample.has_mask else names)
        return Cached(arrays[name].float(), _mirrored(arrays.get("alpha_mask"), flipped=flipped), arrays.get(seen))

    def _file(self, sample: Sample) -> Path | None:
        return next((path for path in (sample.latents_file, sample.old_latents_file) if path.exists()), None)

    def write(self, sample: Sample, latents: Latents, origin: SourceStamp) -> None:
        arrays = {
            "latents": latents.plain.numpy(),
            "original_size": np.array(sample.size, dtype=np.int64),
            "crop_ltrb": np.array(sample.crop, dtype=np.float64),
        }
        if latents.flipped is not None:
            arrays["latents_flipped"] = latents.flipped.numpy()
        more = {"alpha_mask": latents.mask, "inpainting": latents.inpainting, "inpainting_flipped": latents.inpainting_flipped}  # fmt: skip
        arrays |= {name: tensor.numpy() for name, tensor in more.items() if tensor is not None}
        path = sample.old_latents_file if self._old_names else sample.latents_file
        if path.exists():
            arrays = {**npz.foreign_arrays(path, _LATENT_NAMES), **arrays}
        files = {"picture": _remembered(origin), **({} if origin.mask is None else {"mask": _remembered(origin.mask)})}
        self._write(path, arrays, {**self._made_of(sample), **files})


def _remembered(origin: SourceStamp) -> dict[str, Any]:
    """A file as a fingerprint has it. One that changed just now may change again without another time: then contents are compared."""
    settled = time.time_ns() - origin.stamp[1] > 2_000_000_000
    return {"content": origin.content, "size": origin.stamp[0], "time": origin.stamp[1] if settled else 0}


def _mirrored(mask: Tensor | None, *, flipped: bool) -> Tensor | None:
    return mask.flip(-1) if flipped and mask is not None else mask


_LATENT_NAMES = (
    "latents", "latents_flipped", "alpha_mask", "original_size", "crop_ltrb", "inpainting", "inpainting_flipped",
)  # fmt: skip
_ALPHA, _FOLDER = "alpha", "folder"  # where masks of inpainting come from
_TEXT_NAMES = ("hidden_state1", "hidden_state2", "pool2")


class TextOnDisk(_OnDisk):
    def __init__(
        self,
        num_tokens: int,
        widths: tuple[int, int] | None = None,
        encoders: str = "",
        texts: CaptionVariants | None = None,
        known: FileIndex | None = None,
        *,
        trusted: bool = False,
    ):
        """
        Args:
            num_tokens: tokens with both markers (77, 152 or 227).
            widths: of the two encoders' hidden states; None: any.
            encoders: what tells these encoders and their dtype from others.
        """
        super().__init__(known, trusted=trusted)
        self.texts = texts or CaptionVariants()
        self._num_tokens, self._widths, self._encoders = num_tokens, widths or (None, None), encoders

    def problem(self, sample: Sample) -> str | None:
        path = sample.text_file
        if self._trusted:
            return None if self.has(sample) else "not there"
        try:
            contents, _ = self._contents(path)
        except FileNotFoundError:
            return "not there"
        except (OSError, BadFile) as error:
            return str(error) if isinstance(error, BadFile) else "unreadable"
        texts = self.texts.of(sample)
        one, two = self._widths
        wanted = dict(zip(_TEXT_NAMES, ((self._num_tokens, one), (self._num_tokens, two), (two,)), strict=True))
        shapes = {_numbered(name, i): shape for i in range(len(texts)) for name, shape in wanted.items()}
        if reason := _shape_problem(contents, shapes):
            return reason
        if contents.fingerprint is None:
            return "not ours, so its pooled vector may be wrong (see docs/differences.md)"
        return _difference(contents.fingerprint, self._made_of(texts))

    def has(self, sample: Sample) -> bool:
        return sample.text_file.exists()

    def _made_of(self, texts: Sequence[str]) -> dict[str, Any]:
        return {
            "version": _VERSION,
            "captions": [hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest() for text in texts],
            "tokens": self._num_tokens,
            "encoders": self._encoders,
        }  # fmt: skip

    def read(self, sample: Sample, number: int) -> EncodedText:
        arrays = _read(sample.text_file, [_numbered(name, number) for name in _TEXT_NAMES])
        return EncodedText(*arrays.values())

    def write(self, sample: Sample, encoded: Sequence[EncodedText]) -> None:
        arrays = {
            _numbered(name, i): part.float().numpy() if part.dtype == torch.bfloat16 else part.numpy()
            for i, text in enumerate(encoded)
            for name, part in zip(_TEXT_NAMES, text, strict=True)
        }
        self._write(sample.text_file, arrays, self._made_of(self.texts.of(sample)))


def _numbered(name: str, number: int) -> str:
    """The array's name in the file: the first text has the reference's names."""
    return f"{name}_{number}" if number else name


def _shape_problem(contents: Contents, wanted: Mapping[str, tuple[int | None, ...]]) -> str | None:
    for name, shape in wanted.items():
        if name not in contents.arrays:
            return f"lacks {name}"
        kind, found = contents.arrays[name]
        if kind != "f":
            return f"its {name} are no floats"
        if len(found) != len(shape) or any(want not in (None, have) for want, have in zip(shape, found, strict=True)):
            return f"its {name} are {_shape(found)} where {_shape(shape)} are needed"
    return None


_CHANGED = {
    "version": "of another version", "bucket": "of another bucket", "resized": "resized in another way",
    "resize_interpolation": "resized in another way", "alpha_mask": "with alpha_mask on or off", "vae": "of another VAE or dtype",
    "inpainting": "of masks from elsewhere", "captions": "of other captions", "tokens": "of another token length", "encoders": "of other text encoders or dtype",
}  # fmt: skip


def _difference(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str | None:
    return next((_CHANGED[key] for key, value in wanted.items() if found.get(key) != value), None)


def _shape(shape: Sequence[int | None]) -> str:
    return "x".join("?" if n is None else str(n) for n in shape)


def _read(path: Path, names: Sequence[str]) -> dict[str, Tensor]:
    try:
        arrays = npz.read(path, names)
    except BadFile as error:
        raise RunError(
            f"{path}: the cache was changed or damaged since the run began ({error}); remove it and run again"
        ) from None
    return {name: torch.from_numpy(array) for name, array in arrays.items()}
