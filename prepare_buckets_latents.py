"""Encode the images that a metadata file names, and add the bucket of each image to the metadata.

python prepare_buckets_latents.py images metadata.json metadata_with_buckets.json model.safetensors --max_resolution 1024,1024

It writes NAME.npz next to each image, and `train_resolution` and `image_size` into its entry. Training with `--in_json` uses them.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.data.metadata_file import (
    check_recursive,
    find_images,
    key_images,
    load_metadata,
    save_metadata,
)
from library.errors import OptionError, RunError, run
from library.log import log
from tools.metadata_tool import ToolParser, start_tool_logging

if TYPE_CHECKING:  # they import numpy, which --help doesn't need
    from library.data.buckets import BucketSettings
    from library.data.samples import Sample


def main(argv: list[str] | None = None) -> None:
    given = _parser().parse_args(argv)
    start_tool_logging(debug=False)
    settings = _bucket_settings(given)
    if given.max_data_loader_n_workers is not None:
        log.warning("--max_data_loader_n_workers changes nothing here: threads decode ahead")
    check_recursive(recursive=given.recursive, full_path=given.full_path)
    images = find_images(given.train_data_dir, recursive=given.recursive)
    keyed = key_images(images, full_path=given.full_path)
    metadata = load_metadata(given.in_json)
    unknown = [key for key in keyed if key not in metadata]
    if unknown:
        log.warning(
            "%d images are not in %s and are skipped, %s for example",
            len(unknown),
            given.in_json,
            unknown[0],
        )
        for key in unknown:
            del keyed[key]
    samples = _samples(keyed, settings, given)
    _encode(list(samples.values()), given)
    for key, sample in samples.items():
        bucket = sample.fit.bucket
        metadata[key]["train_resolution"] = [bucket.width // 8 * 8, bucket.height // 8 * 8]
        metadata[key]["image_size"] = list(sample.size)
    save_metadata(given.out_json, metadata)
    log.info("%s: %d images have latents", given.out_json, len(samples))


def _parser() -> argparse.ArgumentParser:
    parser = ToolParser(__doc__ or "")
    parser.add_argument("train_data_dir", type=Path, help="folder of the images")
    parser.add_argument("in_json", type=Path, help="metadata file to read")
    parser.add_argument("out_json", type=Path, help="metadata file to write")
    parser.add_argument(
        "model_name_or_path", help="model or VAE that encodes: file, Diffusers folder or hub id"
    )
    parser.add_argument("--v2", action="store_true", help="refused: this tool is for SDXL")
    parser.add_argument(
        "--batch_size", type=int, default=1, help="images encoded at once (default: 1)"
    )
    parser.add_argument(
        "--max_data_loader_n_workers",
        type=int,
        help="changes nothing here: threads decode ahead",
    )
    parser.add_argument(
        "--max_resolution",
        default="512,512",
        help="largest area in pixels, as width,height (default: 512,512)",
    )
    parser.add_argument(
        "--min_bucket_reso", type=int, default=256, help="shortest bucket side (default: 256)"
    )
    parser.add_argument(
        "--max_bucket_reso", type=int, default=1024, help="longest bucket side (default: 1024)"
    )
    parser.add_argument(
        "--bucket_reso_steps",
        type=int,
        default=64,
        help="bucket sides are multiples of this (default: 64)",
    )
    parser.add_argument("--bucket_no_upscale", action="store_true", help="never enlarge an image")
    parser.add_argument(
        "--mixed_precision",
        choices=("no", "fp16", "bf16"),
        default="no",
        help="dtype of the VAE (default: no, float32)",
    )
    parser.add_argument(
        "--full_path", action="store_true", help="keys are the images' paths, not their names"
    )
    parser.add_argument("--flip_aug", action="store_true", help="encode mirrored images too")
    parser.add_argument(
        "--alpha_mask", default="", help="any text: store the alpha channels as loss masks"
    )
    parser.add_argument(
        "--skip_existing", action="store_true", help="keep existing latents that are valid"
    )
    parser.add_argument(
        "--recursive", action="store_true", help="search subfolders too; needs --full_path"
    )
    return parser


def _bucket_settings(given: argparse.Namespace) -> "BucketSettings":
    """Return the bucket settings.

    Raises:
        OptionError: with all mistakes in the arguments.
    """
    from library.data.buckets import BucketSettings
    from library.data.options import parse_resolution

    mistakes = []
    size = parse_resolution(given.max_resolution)
    if size is None or "," not in given.max_resolution:
        mistakes.append(
            f"--max_resolution {given.max_resolution!r}: expected width,height like 1024,1024"
        )
    step = given.bucket_reso_steps
    if step < 8 or step % 8:
        mistakes.append(
            f"--bucket_reso_steps {step}: expected a multiple of 8; SDXL is trained at 32 or 64"
        )
    elif step % 32:
        log.warning("--bucket_reso_steps %d: SDXL is trained at multiples of 32", step)
    if given.batch_size < 1:
        mistakes.append(f"--batch_size {given.batch_size}: must be at least 1")
    if size is not None:
        if not given.bucket_no_upscale and min(size) < given.min_bucket_reso:
            mistakes.append(
                f"--min_bucket_reso {given.min_bucket_reso} is above the shorter side of "
                "--max_resolution"
            )
        if max(size) > given.max_bucket_reso:
            mistakes.append(
                f"--max_bucket_reso {given.max_bucket_reso} is below the longer side of "
                "--max_resolution"
            )
    if given.v2:
        mistakes.append("--v2: this tool is for SDXL")
    if mistakes:
        raise OptionError(*mistakes)
    assert size is not None
    return BucketSettings(
        enable_bucket=True,
        min_bucket_reso=given.min_bucket_reso,
        max_bucket_reso=given.max_bucket_reso,
        bucket_reso_steps=step,
        bucket_no_upscale=given.bucket_no_upscale,
        resolution=size,
    )


def _samples(
    keyed: Mapping[str, Path], settings: "BucketSettings", given: argparse.Namespace
) -> dict[str, "Sample"]:
    """Return the samples by key.

    Raises:
        OptionError: with all images whose header can't be read, or that are too small.
    """
    from library.data.buckets import Buckets
    from library.data.captions import CaptionSettings
    from library.data.samples import PixelSettings, Sample, Subset
    from library.images import ImageError, read_image_info

    buckets, step = Buckets(settings), settings.bucket_reso_steps
    pixels = PixelSettings(flip_aug=given.flip_aug, alpha_mask=bool(given.alpha_mask))
    subset = Subset(given.train_data_dir, 1, CaptionSettings(), pixels)
    samples, mistakes = {}, []
    for key, path in keyed.items():
        try:
            size = read_image_info(path).size
            fit = buckets.fit(size)
            if 0 in fit.bucket:
                raise ImageError(f"its size {size} is below one bucket step of {step} pixels")
        except ImageError as error:
            mistakes.append(f"{path}: {error}")
            continue
        stem = str(path.with_suffix(""))
        samples[key] = Sample(str(path), "", "", subset, 0, size, fit, stem, 1)
    if mistakes:
        raise OptionError(*mistakes)
    return samples


def _encode(samples: Sequence["Sample"], given: argparse.Namespace) -> None:
    """Encode the images.

    Raises:
        RunError: with all images that can't be encoded.
    """
    import torch

    from library.data.cache.fill import fill_latents
    from library.data.cache.latents import LatentsOnDisk
    from library.data.file_index import FileIndex
    from library.device import DTYPES
    from library.models.checkpoint.weights_hash import weights_hash
    from library.models.sdxl import load_vae, vae_tensors
    from library.models.vae import encode

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tensors = vae_tensors(given.model_name_or_path)
    dtype = DTYPES[given.mixed_precision]

    def load(dtype: torch.dtype) -> Any:
        return load_vae(tensors, dtype, device, what=given.model_name_or_path)

    def encode_images(images: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        return encode(vae, images, noise, lambda: load(torch.float32))

    vae, file_index = load(dtype), FileIndex()
    identity = f"{weights_hash(tensors)} in {str(dtype).removeprefix('torch.')}"
    cache = LatentsOnDisk(identity, file_index, old_names=True)
    rejected = fill_latents(
        samples, cache, encode_images, given.batch_size, overwrite=not given.skip_existing
    )
    cache.record_written()
    file_index.save()
    if rejected:
        listed = "\n  ".join(f"{sample.path}: {reason}" for sample, reason in rejected)
        raise RunError(
            f"{len(rejected)} images can't be encoded, so {given.out_json} is not written. Fix or "
            f"remove them, and run again with --skip_existing:\n  {listed}"
        )


if __name__ == "__main__":
    run(main)
