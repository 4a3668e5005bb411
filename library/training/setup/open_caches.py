"""The caches of a run as its options mean them, not filled, with the fingerprints of their encoders."""

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from library.data.cache.latents import LatentCache, LatentsInMemory, LatentsOnDisk
from library.data.cache.text import CaptionVariants, TextCache, TextInMemory, TextOnDisk
from library.data.file_index import FileIndex
from library.data.options import CacheOptions
from library.models.checkpoint.weights_hash import weights_hash
from library.models.sdxl import SdxlModels

_TEXT_ENCODERS = ("text_encoder_1", "text_encoder_2")


def latent_cache(models: SdxlModels, options: CacheOptions, file_index: FileIndex) -> LatentCache:
    """Return the cache of latents that the options mean, not filled."""
    for_inpainting = models.checkpoint.unet.is_inpainting
    if not options.cache_latents_to_disk:
        return LatentsInMemory(for_inpainting=for_inpainting)
    fingerprint = ""
    if not options.skip_cache_check:
        fingerprint = _fingerprint(models, ["vae"], models.precision.vae, file_index)
    return LatentsOnDisk(
        fingerprint, file_index, trusted=options.skip_cache_check, for_inpainting=for_inpainting
    )


def text_cache(
    models: SdxlModels,
    options: CacheOptions,
    file_index: FileIndex,
    *,
    num_tokens: int,
    weighted: bool,
) -> TextCache:
    """Return the cache of text-encoder outputs that the options mean, not filled."""
    variants = CaptionVariants(options.text_cache_variants)
    if not options.cache_text_encoder_outputs_to_disk:
        return TextInMemory(variants)
    fingerprint = ""
    if not options.skip_cache_check:
        components = [name for name in _TEXT_ENCODERS if name in models.checkpoint.parts]
        fingerprint = _fingerprint(models, components, models.precision.compute, file_index)
    if weighted:
        fingerprint += ", captions weighted"
    patch = models.change.text_identity() if models.change is not None else ""
    if patch:
        fingerprint += f", with {patch}"
    width_1, width_2 = (token_width(models, component) for component in _TEXT_ENCODERS)
    return TextOnDisk(
        num_tokens + 2,
        (width_1, width_2),
        fingerprint,
        variants,
        file_index,
        trusted=options.skip_cache_check,
    )


def _fingerprint(
    models: SdxlModels, components: Sequence[str], dtype: torch.dtype, file_index: FileIndex
) -> str:
    """Return what identifies the encoders of a cache: hashes of their weights, remembered by file, and their dtype."""
    hashes = []
    for component in components:
        source = models.source(component)
        folder, name = os.path.split(os.path.abspath(source))
        stamp, key = _stamp_of(source), f"hash of {component}"
        known = file_index.get(folder, name, stamp).get(key)
        if known is None:
            known = weights_hash(models.stored(component))
            file_index.record(folder, name, stamp, **{key: known})
        hashes.append(known)
    return f"{' '.join(hashes)} in {str(dtype).removeprefix('torch.')}"


def _stamp_of(source: Path) -> tuple[int, int]:
    """Return size and time of a file, or of all files in a folder together."""
    files = [source]
    if not source.is_file():
        files = [path for path in source.rglob("*") if path.is_file()]
    size, newest = 0, 0
    for path in files:
        stat = path.stat()
        size += stat.st_size
        newest = max(newest, stat.st_mtime_ns)
    return size, newest


def token_width(models: SdxlModels, component: str) -> int:
    """Return the width of a text encoder's hidden states; 0 if the model doesn't have it."""
    tensors = models.checkpoint.tensors(component)
    if not tensors:
        return 0
    return tensors["text_model.embeddings.token_embedding.weight"].shape[1]


def encodes_images(models: SdxlModels, cache: CacheOptions, *, are_masked: bool) -> bool:
    """Return whether steps need the VAE.

    They do for images without cached latents, and for the input of inpainting models under random masks.

    Args:
        models: the base model.
        cache: whether latents are cached.
        are_masked: all images have masks of their own, so that the masked image is cached too.
    """
    return not cache.latents or (models.checkpoint.unet.is_inpainting and not are_masked)
