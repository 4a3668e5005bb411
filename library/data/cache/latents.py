"""Caches of latents, in RAM or on disk.

On disk they are .npz files as sd-scripts writes them (contract: formats.md section 1), with a
fingerprint of what they were made from.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from torch import Tensor

from library.data.cache import npz
from library.data.cache.disk import (
    NOT_THERE,
    VERSION,
    DiskCache,
    SourceStamp,
    damage_reason,
    fingerprint_difference,
    read_arrays,
    shape_difference,
)
from library.data.cache.npz import Contents, NpzError
from library.data.file_index import FileIndex, FileStamp, file_stamp
from library.data.samples import Sample
from library.errors import RunError
from library.models.vae import PIXELS_PER_LATENT

LATENT_CHANNELS = 4


class Latents(NamedTuple):
    """What is cached of an image, float32.

    Attributes:
        latents: raw latents, [4, H/8, W/8].
        flipped: raw latents of the mirrored image, with flip_aug.
        mask: the loss mask from the alpha channel, [H, W] in 0..1.
        inpainting: input of an inpainting model for an image with a mask of its own,
            [5, H/8, W/8]: the latent cells to inpaint, and raw latents of the masked image.
        inpainting_flipped: the same of the mirrored image.
    """

    latents: Tensor
    flipped: Tensor | None = None
    mask: Tensor | None = None
    inpainting: Tensor | None = None
    inpainting_flipped: Tensor | None = None

    def for_batch(self, *, flipped: bool) -> "CachedImage":
        """Return what a batch takes of the image, or of its mirrored image."""
        if not flipped:
            return CachedImage(self.latents, self.mask, self.inpainting)
        assert self.flipped is not None
        return CachedImage(self.flipped, _mirrored(self.mask), self.inpainting_flipped)


class CachedImage(NamedTuple):
    """An image, or its mirrored image, as a batch takes it. Shapes are those of Latents."""

    latents: Tensor
    mask: Tensor | None
    inpainting: Tensor | None


class LatentCache(Protocol):
    """Raw latents of each sample.

    Attributes:
        in_memory: the cache is in this process's RAM.
        for_inpainting: the cache also holds the inputs of an inpainting model, for samples that
            have masks of their own.
    """

    in_memory: bool
    for_inpainting: bool

    def invalid_reason(self, sample: Sample) -> str | None:
        """Return why there are no valid latents of the sample; None if there are."""
        ...

    def has(self, sample: Sample) -> bool:
        """Return whether there are latents, valid or not, which is quick to see after filling."""
        ...

    def read(self, sample: Sample, *, flipped: bool = False) -> CachedImage:
        """Return what a batch takes of the sample, or of its mirrored image."""
        ...

    def write(self, sample: Sample, latents: Latents, source: SourceStamp) -> None:
        """Store the latents that were made from the source."""
        ...


class LatentsInMemory:
    """A cache in RAM."""

    in_memory = True

    def __init__(self, *, for_inpainting: bool = False) -> None:
        self.for_inpainting = for_inpainting
        self._latents: dict[str, Latents] = {}

    def invalid_reason(self, sample: Sample) -> str | None:
        return None if self.has(sample) else "not encoded yet"

    def has(self, sample: Sample) -> bool:
        return sample.cache_stem in self._latents

    def read(self, sample: Sample, *, flipped: bool = False) -> CachedImage:
        return self._latents[sample.cache_stem].for_batch(flipped=flipped)

    def write(self, sample: Sample, latents: Latents, source: SourceStamp) -> None:
        self._latents[sample.cache_stem] = latents


# Names of our arrays in files. Others are kept when a file is written again.
_ARRAYS = (
    "latents",
    "latents_flipped",
    "alpha_mask",
    "original_size",
    "crop_ltrb",
    "inpainting",
    "inpainting_flipped",
)
# Values of the fingerprint's "inpainting": where the masks come from.
_ALPHA, _FOLDER = "alpha", "folder"


class LatentsOnDisk(DiskCache):
    """A cache in one file for each sample, NAME_WWWWxHHHH_sdxl.npz."""

    def __init__(
        self,
        vae: str = "",
        file_index: FileIndex | None = None,
        *,
        trusted: bool = False,
        old_names: bool = False,
        for_inpainting: bool = False,
    ):
        """Create a cache.

        Args:
            vae: identifies the VAE and its dtype.
            file_index: what is known of files from earlier runs.
            trusted: every existing file counts as valid (--skip_cache_check).
            old_names: write NAME.npz, as prepare_buckets_latents.py does. Both names are read.
            for_inpainting: also store the inputs of an inpainting model.
        """
        super().__init__(file_index, trusted=trusted)
        self.for_inpainting = for_inpainting
        self._vae, self._old_names = vae, old_names

    # ------------------------------------------------------------------------------------ validity

    def invalid_reason(self, sample: Sample) -> str | None:
        if self._trusted:
            return self._trusted_reason(sample)
        reason = self._reason(sample.latents_file, sample)
        if reason == NOT_THERE and self._reason(sample.old_latents_file, sample) is None:
            return None
        return reason

    def has(self, sample: Sample) -> bool:
        return self._file(sample) is not None

    def _file(self, sample: Sample) -> Path | None:
        for path in (sample.latents_file, sample.old_latents_file):
            if path.exists():
                return path
        return None

    def _has_inpainting(self, sample: Sample) -> bool:
        return self.for_inpainting and sample.has_mask

    def _trusted_reason(self, sample: Sample) -> str | None:
        path = self._file(sample)
        if path is None:
            return NOT_THERE
        if not self._has_inpainting(sample):
            return None
        # Files from before masks were cached lack these inputs, so shapes alone are checked.
        try:
            contents, _ = self._contents(path)
        except (OSError, NpzError):
            return "unreadable"
        return shape_difference(contents, self._shapes(sample))

    def _reason(self, path: Path, sample: Sample) -> str | None:
        """Return why the file has no valid latents of the sample; None if it has."""
        try:
            contents, stamp = self._contents(path)
        except FileNotFoundError:
            return NOT_THERE
        except (OSError, NpzError) as error:
            return damage_reason(error)
        difference = shape_difference(contents, self._shapes(sample))
        if difference is not None:
            return difference
        if contents.fingerprint is None:
            return self._reason_without_fingerprint(path, stamp, contents, sample)
        return self._fingerprint_reason(contents.fingerprint, sample)

    def _fingerprint_reason(self, found: Mapping[str, Any], sample: Sample) -> str | None:
        fingerprint = self._fingerprint(sample)
        difference = fingerprint_difference(found, fingerprint)
        if difference is None:
            difference = self._source_difference(found.get("picture", {}), sample.file, "image")
        if difference is None and fingerprint.get("inpainting") == _FOLDER:
            assert sample.conditioning is not None
            mask = found.get("mask", {})
            difference = self._source_difference(mask, sample.conditioning, "mask")
        return difference

    def _reason_without_fingerprint(
        self, path: Path, stamp: FileStamp, contents: Contents, sample: Sample
    ) -> str | None:
        """Accept files of sd-scripts that are newer than the image and were made at its size."""
        if stamp[1] < file_stamp(sample.file)[1]:
            return "older than its image"
        if "original_size" in contents.arrays:
            size = npz.read(path, ["original_size"])["original_size"].ravel().tolist()
            if size != list(sample.size):
                return "made from an image of another size"
        return None

    def _shapes(self, sample: Sample) -> dict[str, tuple[int, ...]]:
        bucket, pixels = sample.fit.bucket, sample.subset.pixels
        cells = (bucket.height // PIXELS_PER_LATENT, bucket.width // PIXELS_PER_LATENT)
        shapes: dict[str, tuple[int, ...]] = {"latents": (LATENT_CHANNELS, *cells)}
        if pixels.flip_aug:
            shapes["latents_flipped"] = shapes["latents"]
        if pixels.alpha_mask:
            shapes["alpha_mask"] = (bucket.height, bucket.width)
        if self._has_inpainting(sample):
            shapes["inpainting"] = (1 + LATENT_CHANNELS, *cells)
            if pixels.flip_aug:
                shapes["inpainting_flipped"] = shapes["inpainting"]
        return shapes

    def _fingerprint(self, sample: Sample) -> dict[str, Any]:
        pixels = sample.subset.pixels
        fingerprint: dict[str, Any] = {
            "version": VERSION,
            "bucket": list(sample.fit.bucket),
            "resized": list(sample.fit.resized),
            "resize_interpolation": pixels.resize_interpolation,
            # With alpha_mask the pixels are the file's; without it they are composited on white.
            "alpha_mask": pixels.alpha_mask,
            "vae": self._vae,
        }
        if self._has_inpainting(sample):
            fingerprint["inpainting"] = _ALPHA if pixels.alpha_mask else _FOLDER
        return fingerprint

    # ---------------------------------------------------------------------------- reading, writing

    def read(self, sample: Sample, *, flipped: bool = False) -> CachedImage:
        path = self._file(sample)
        if path is None:
            raise RunError(
                f"{sample.latents_file}: the cached latents have been removed; run again to make "
                "them again"
            )
        suffix = "_flipped" if flipped else ""
        names = [f"latents{suffix}"]
        if sample.subset.pixels.alpha_mask:
            names.append("alpha_mask")
        if self._has_inpainting(sample):
            names.append(f"inpainting{suffix}")
        arrays = read_arrays(path, names)
        mask = arrays.get("alpha_mask")
        return CachedImage(
            arrays[f"latents{suffix}"].float(),
            _mirrored(mask) if flipped else mask,
            arrays.get(f"inpainting{suffix}"),
        )

    def write(self, sample: Sample, latents: Latents, source: SourceStamp) -> None:
        arrays = {
            "latents": latents.latents.numpy(),
            "original_size": np.array(sample.size, dtype=np.int64),
            "crop_ltrb": np.array(sample.crop, dtype=np.float64),
        }
        optional = {
            "latents_flipped": latents.flipped,
            "alpha_mask": latents.mask,
            "inpainting": latents.inpainting,
            "inpainting_flipped": latents.inpainting_flipped,
        }
        for name, tensor in optional.items():
            if tensor is not None:
                arrays[name] = tensor.numpy()
        path = sample.old_latents_file if self._old_names else sample.latents_file
        if path.exists():
            arrays = {**npz.foreign_arrays(path, _ARRAYS), **arrays}
        fingerprint = {**self._fingerprint(sample), "picture": source.as_json()}
        if source.mask is not None:
            fingerprint["mask"] = source.mask.as_json()
        self._write(path, arrays, fingerprint)


def _mirrored(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.flip(-1)
