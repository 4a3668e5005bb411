"""Scanning a train_data_dir as the scripts do, and stand-ins for the encoders."""

from pathlib import Path

import torch

from library.data.dataset_config import read_datasets
from library.data.options import DATA_OPTIONS
from library.data.scan import Dataset, scan
from library.models.text_encoders import EncodedText
from library.options import read_options

BUCKETS = [
    "--resolution",
    "128",
    "--enable_bucket",
    "--bucket_reso_steps",
    "32",
    "--min_bucket_reso",
    "64",
    "--max_bucket_reso",
    "256",
]


def scanned(folder: Path, *argv: object, buckets: list[str] = BUCKETS, **settings) -> list[Dataset]:
    """Args: settings: scan()'s."""
    words = [str(word) for word in ["--train_data_dir", folder, *buckets, *argv]]
    options = read_options("test", DATA_OPTIONS, words)
    return scan(read_datasets(options)[0], **settings)


def samples_of(datasets: list[Dataset]) -> list:
    return [sample for dataset in datasets for sample in dataset.samples]


def stub_vae(images: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Latents that tell what went in: the mean of each 8x8 patch, and the noise."""
    means = torch.nn.functional.avg_pool2d(images.mean(1, keepdim=True), 8)
    return means.expand(-1, 4, -1, -1) + 0.01 * noise


def stub_text(captions) -> EncodedText:
    """Outputs that tell how long the caption was."""
    lengths = torch.tensor([[float(len(caption))] for caption in captions])
    return EncodedText(
        lengths[..., None].expand(-1, 77, 8),
        lengths[..., None].expand(-1, 77, 16),
        lengths.expand(-1, 16),
    )
