"""Encode the pictures that a metadata file names, and add the bucket of each to the metadata.

python prepare_buckets_latents.py pictures metadata.json metadata_with_buckets.json model.safetensors --max_resolution 1024,1024

Writes NAME.npz beside each picture and `train_resolution` and `image_size` to its entry; `--in_json` training uses them.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from library.data.metadata_merge import (
    ToolParser,
    find_images,
    key_images,
    read_metadata,
    start_tool_logging,
    write_metadata,
)
from library.errors import OptionError, RunError, run
from library.log import log


def main(argv: list[str] | None = None) -> None:
    given = _parser().parse_args(argv)
    start_tool_logging(debug=False)
    plan = _plan(given)
    if given.max_data_loader_n_workers is not None:
        log.warning("--max_data_loader_n_workers changes nothing here: threads always decode ahead")
    if given.recursive and not given.full_path:
        raise OptionError("--recursive needs --full_path: pictures of two folders may have one name")
    keyed = key_images(find_images(given.train_data_dir, recursive=given.recursive), full_path=given.full_path)
    metadata = read_metadata(given.in_json)
    unknown = [key for key in keyed if key not in metadata]
    if unknown:
        log.warning(
            "%d pictures are not in %s and are left out, among them %s", len(unknown), given.in_json, unknown[0]
        )
    samples = _samples({key: path for key, path in keyed.items() if key in metadata}, plan, given)
    _fill(list(samples.values()), given)
    for key, sample in samples.items():
        bucket = sample.fit.bucket
        metadata[key]["train_resolution"] = [bucket.width // 8 * 8, bucket.height // 8 * 8]
        metadata[key]["image_size"] = list(sample.size)
    write_metadata(given.out_json, metadata)
    log.info("%s: %d pictures have latents", given.out_json, len(samples))


def _parser() -> argparse.ArgumentParser:
    parser = ToolParser(__doc__ or "")
    parser.add_argument("train_data_dir", type=Path, help="folder of the pictures")
    parser.add_argument("in_json", type=Path, help="metadata file to read")
    parser.add_argument("out_json", type=Path, help="metadata file to write")
    parser.add_argument("model_name_or_path", help="model or VAE that encodes: file, Diffusers folder or hub id")
    parser.add_argument("--v2", action="store_true", help="refused: this is for SDXL")
    parser.add_argument("--batch_size", type=int, default=1, help="pictures encoded at once (default: 1)")
    parser.add_argument(
        "--max_data_loader_n_workers", type=int, help="changes nothing here: threads always decode ahead"
    )
    parser.add_argument("--max_resolution", default="512,512", help="area in pixels, width,height (default: 512,512)")
    parser.add_argument("--min_bucket_reso", type=int, default=256, help="shortest bucket side (default: 256)")
    parser.add_argument("--max_bucket_reso", type=int, default=1024, help="longest bucket side (default: 1024)")
    parser.add_argument(
        "--bucket_reso_steps", type=int, default=64, help="bucket sides are multiples of this (default: 64)"
    )
    parser.add_argument("--bucket_no_upscale", action="store_true", help="never enlarge a picture")
    parser.add_argument(
        "--mixed_precision",
        choices=("no", "fp16", "bf16"),
        default="no",
        help="dtype of the VAE (default: no, float32)",
    )
    parser.add_argument("--full_path", action="store_true", help="keys are the pictures' paths, not their bare names")
    parser.add_argument("--flip_aug", action="store_true", help="encode the mirrored pictures too")
    parser.add_argument("--alpha_mask", default="", help="any text: keep the alpha channels as loss masks")
    parser.add_argument("--skip_existing", action="store_true", help="keep latents that are there and valid")
    parser.add_argument("--recursive", action="store_true", help="search sub-folders too; needs --full_path")
    return parser


def _plan(given: argparse.Namespace) -> Any:
    """The buckets. Raises OptionError with all that is wrong with the arguments."""
    from library.data.buckets import BucketPlan
    from library.data.options import parse_resolution

    mistakes = []
    size = parse_resolution(given.max_resolution)
    if size is None or "," not in given.max_resolution:
        mistakes.append(f"--max_resolution {given.max_resolution!r}: expected width,height like 1024,1024")
    if given.bucket_reso_steps < 8 or given.bucket_reso_steps % 8:
        mistakes.append(
            f"--bucket_reso_steps {given.bucket_reso_steps}: expected a multiple of 8; SDXL trains at 32 or 64"
        )
    elif given.bucket_reso_steps % 32:
        log.warning("--bucket_reso_steps %d: SDXL trains at multiples of 32", given.bucket_reso_steps)
    if given.batch_size < 1:
        mistakes.append(f"--batch_size {given.batch_size}: must be at least 1")
    if size is not None and not given.bucket_no_upscale and min(size) < given.min_bucket_reso:
        mistakes.append(f"--min_bucket_reso {given.min_bucket_reso} is above the shorter side of --max_resolution")
    if size is not None and max(size) > given.max_bucket_reso:
        mistakes.append(f"--max_bucket_reso {given.max_bucket_reso} is below the longer side of --max_resolution")
    if given.v2:
        mistakes.append("--v2: this tool is for SDXL")
    if mistakes:
        raise OptionError(*mistakes)
    return BucketPlan(
        size, True, given.min_bucket_reso, given.max_bucket_reso, given.bucket_reso_steps, given.bucket_no_upscale
    )


def _samples(keyed: dict[str, Path], plan: Any, given: argparse.Namespace) -> dict[str, Any]:
    """Samples by key. Raises OptionError with all pictures whose headers can't be read, or that are too small."""
    from library.data.buckets import Buckets
    from library.data.captions import CaptionSettings
    from library.data.samples import PixelSettings, Sample, Subset
    from library.images import ImageError, read_image_info

    buckets = Buckets(plan)
    pixels = PixelSettings(flip_aug=given.flip_aug, alpha_mask=bool(given.alpha_mask))
    subset = Subset(given.train_data_dir, 1, CaptionSettings(), pixels)
    samples, mistakes = {}, []
    for key, path in keyed.items():
        try:
            size = read_image_info(path).size
            fit = buckets.fit(size)
            if 0 in fit.bucket:
                raise ImageError(f"its size {size} is below one bucket step of {plan.step} pixels")
        except ImageError as error:
            mistakes.append(f"{path}: {error}")
            continue
        samples[key] = Sample(str(path), "", "", subset, 0, size, fit, str(path.with_suffix("")), 1)
    if mistakes:
        raise OptionError(*mistakes)
    return samples


def _fill(samples: Sequence[Any], given: argparse.Namespace) -> None:
    """Encode the pictures. Raises RunError with all that can't be."""
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
    vae = load_vae(tensors, dtype, device, what=given.model_name_or_path)
    known = FileIndex()
    cache = LatentsOnDisk(f"{weights_hash(tensors)} in {str(dtype).removeprefix('torch.')}", known, old_names=True)

    def encode_images(images: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        return encode(
            vae, images, noise, lambda: load_vae(tensors, torch.float32, device, what=given.model_name_or_path)
        )

    bad = fill_latents(samples, cache, encode_images, given.batch_size, anew=not given.skip_existing)
    cache.settle()
    known.save()
    if bad:
        told = "\n  ".join(f"{sample.path}: {reason}" for sample, reason in bad)
        raise RunError(
            f"{len(bad)} pictures can't be encoded, so {given.out_json} is not written; mend or remove them, and run again "
            f"with --skip_existing:\n  {told}"
        )


if __name__ == "__main__":
    run(main)
