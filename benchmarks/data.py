"""The data room: scanning, caching and reading back.

    python benchmarks/data.py

Makes its images (5,000 small files of 512 to 1600 pixels a side) in a temporary folder. Every row is the median of several
runs in one process; the pages of the files are warm.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from library.data.batch_sampler import BatchSampler
from library.data.buckets import Fit
from library.data.cache.disk import SourceStamp
from library.data.cache.fill import batches_by_bucket, fill_latents, fill_text
from library.data.cache.latents import Latents, LatentsInMemory, LatentsOnDisk
from library.data.cache.text import CaptionVariants, TextInMemory, TextOnDisk
from library.data.captions import CaptionSettings
from library.data.dataset_config import read_datasets
from library.data.file_index import FileIndex
from library.data.loader import Batches, group_samples
from library.data.options import DATA_OPTIONS
from library.data.samples import PixelSettings, Sample, Subset
from library.data.scan import Dataset, scan
from library.log import log
from library.models import vae
from library.models.text_encoders import EncodedText
from library.options import read_options
from library.size import Size

ROOT = Path(__file__).resolve().parent.parent
IMAGES, MEGAPIXEL_IMAGES, ROWS = 5_000, 96, 1_000_000


def main() -> None:
    log.setLevel("ERROR")
    os.environ["TQDM_DISABLE"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        top = Path(folder)
        os.environ["XDG_CACHE_HOME"] = str(top / "user")
        rows = [
            *scanning(top),
            *caching(top),
            *reading(top),
            *text(),
            *real_vae(top),
            a_million_rows(top),
        ]
    print("| what | limit | measured |\n|---|---|---|")
    for what, limit, measured in rows:
        print(f"| {what} | {limit} | {measured} |")


Row = tuple[str, str, str]


def median_seconds(function: Callable[[], object], times: int = 5) -> float:
    found = []
    for _ in range(times):
        start = time.perf_counter()
        function()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def scanned(
    folder: Path, known: FileIndex, *words: object, resolution: int = 1024
) -> list[Dataset]:
    argv = [
        "--train_data_dir",
        folder,
        "--resolution",
        resolution,
        "--enable_bucket",
        "--max_bucket_reso",
        2048,
        *words,
    ]
    options = read_options("", DATA_OPTIONS, [str(word) for word in argv])
    return scan(read_datasets(options)[0], known)


def make_images(
    folder: Path, count: int, draw: np.random.Generator, *, side: int | None = None
) -> None:
    """Photograph-like images: noise, enlarged; half of them JPEG, half PNG."""
    folder.mkdir(parents=True)

    def make(i: int, seed: int) -> None:
        own = np.random.default_rng(seed)
        size = (side, side) if side else tuple(map(int, own.integers(512, 1600, 2)))
        small = Image.fromarray(own.integers(0, 255, (24, 24, 3), dtype=np.uint8))
        path = folder / f"{i:05d}.{'jpg' if i % 2 else 'png'}"
        small.resize(size, Image.Resampling.BICUBIC).save(
            path, **({"quality": 90} if i % 2 else {"compress_level": 1})
        )
        path.with_suffix(".txt").write_text(
            f"an image, number {i}, of noise, soft, in colors", encoding="utf-8"
        )

    with ThreadPoolExecutor() as pool:
        list(pool.map(make, range(count), draw.integers(0, 2**32, count).tolist()))


def scanning(top: Path) -> list[Row]:
    make_images(top / "many" / "1_x", IMAGES, np.random.default_rng(0))
    time.sleep(2.1)  # the index doesn't trust files that are younger
    homes = iter(top / f"index{i}" for i in range(100))
    fresh = median_seconds(lambda: scanned(top / "many", FileIndex(next(homes))))
    known = FileIndex()
    scanned(top / "many", known)
    known.save()
    from_index = median_seconds(lambda: scanned(top / "many", FileIndex()))
    samples = samples_of(scanned(top / "many", FileIndex()))
    common = [
        sample for sample in samples if sample.fit.bucket in _most_common_buckets(samples, 25)
    ]
    repeated = (common * (IMAGES // len(common) + 1))[:IMAGES]
    return [
        ("scan of 1,000 images with captions", "0.08 s", f"{fresh * 1000 / IMAGES:.3f} s"),
        ("the same from the index", "0.03 s", f"{from_index * 1000 / IMAGES:.3f} s"),
        (
            "batches of 4 for 5,000 images in 25 buckets",
            "1,270",
            f"{len(batches_by_bucket(repeated, 4, for_inpainting=False)):,}",
        ),
    ]


def _most_common_buckets(samples: Sequence[Sample], count: int) -> set:
    return {
        bucket for bucket, _ in Counter(sample.fit.bucket for sample in samples).most_common(count)
    }


def samples_of(datasets: Sequence[Dataset]) -> list[Sample]:
    return [sample for dataset in datasets for sample in dataset.samples]


def caching(top: Path) -> list[Row]:
    make_images(top / "large" / "1_x", MEGAPIXEL_IMAGES, np.random.default_rng(1), side=1024)
    samples = samples_of(scanned(top / "large", FileIndex()))

    def stub(images: Tensor, noise: Tensor) -> Tensor:
        return noise

    seconds = median_seconds(
        lambda: fill_latents(samples, UncheckedLatentsOnDisk(top), stub, 4), times=3
    )
    return [
        (
            "latents of 1024 x 1024 images, VAE stubbed",
            "40 / s",
            f"{len(samples) / seconds:.0f} / s",
        )
    ]


class UncheckedLatentsOnDisk(LatentsOnDisk):
    """A cache that takes nothing for valid, so that everything is made again."""

    def __init__(self, top: Path):
        super().__init__("stub", FileIndex(top / "anew"))

    def problem(self, sample: Sample) -> str | None:
        return "not there"


def reading(top: Path) -> list[Row]:
    datasets = scanned(top / "large", FileIndex(), "--flip_aug")
    samples = samples_of(datasets)
    latents, texts = LatentsOnDisk("stub"), TextOnDisk(77, (768, 1280), "stub")
    hidden = EncodedText(torch.randn(77, 768), torch.randn(77, 1280), torch.randn(1280))
    for sample in samples:
        shape = (4, sample.fit.bucket.height // 8, sample.fit.bucket.width // 8)
        latents.write(
            sample, Latents(torch.randn(shape), torch.randn(shape)), SourceStamp("", (0, 0))
        )
        texts.write(sample, [hidden])
    batches = Batches(samples, latents, texts, seed=0, max_train_steps=1)
    micro = [
        one
        for one, _ in zip(
            BatchSampler(group_samples(datasets, samples), 0).from_step(0, 0), samples, strict=False
        )
    ]
    seconds = median_seconds(lambda: [batches[one] for one in micro])
    return [
        (
            "samples read back, latents and text together",
            "1,000 / s",
            f"{len(micro) / seconds:,.0f} / s",
        )
    ]


def text() -> list[Row]:
    """The share of the time inside the encoders, which are stubs; the real ones take several times as long on two cores."""
    inside = [0.0]
    outputs = EncodedText(
        torch.randn(64, 77, 768), torch.randn(64, 77, 1280), torch.randn(64, 1280)
    )

    def encode(captions: Sequence[str]) -> EncodedText:
        start = time.perf_counter()
        time.sleep(0.03 * len(captions))
        inside[0] += time.perf_counter() - start
        return EncodedText(*(part[: len(captions)] for part in outputs))

    subset = Subset(Path(), 1, CaptionSettings(), PixelSettings())
    one = Sample("a.png", "", "", subset, 0, Size(8, 8), Fit(Size(8, 8), Size(8, 8)), "a", 1)
    with tempfile.TemporaryDirectory() as folder:
        samples = [
            replace(one, caption=f"caption {i}", cache_stem=f"{folder}/{i}") for i in range(512)
        ]
        start = time.perf_counter()
        fill_text(samples, TextOnDisk(77, file_index=FileIndex(Path(folder) / "index")), encode)
        share = inside[0] / (time.perf_counter() - start)
        fill_text(samples, TextInMemory(CaptionVariants()), encode)
    return [
        (
            "time inside the text encoders while caching their outputs to disk",
            "95 %",
            f"{share:.0%}",
        )
    ]


def real_vae(top: Path) -> list[Row]:
    """Filling against encoding the same images alone; SDXL's VAE with random weights, at 256 pixels."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    model = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4, layers_per_block=2, latent_channels=4,
    ).eval().to(memory_format=torch.channels_last)  # fmt: skip
    samples = samples_of(scanned(top / "large", FileIndex(), resolution=256))[:12]
    spent = [0.0]

    def encode(images: Tensor, noise: Tensor) -> Tensor:
        start = time.perf_counter()
        latents = vae.encode(model, images, noise)
        spent[0] += time.perf_counter() - start
        return latents

    fill_latents(samples[:4], LatentsInMemory(), encode, 4)
    ratios = []
    for _ in range(3):
        spent[0], start = 0.0, time.perf_counter()
        fill_latents(samples, LatentsInMemory(), encode, 4)
        ratios.append((time.perf_counter() - start) / spent[0])
    return [
        (
            "filling with the real VAE against VAE time alone",
            "1.05 ×",
            f"{statistics.median(ratios):.3f} ×",
        )
    ]


def a_million_rows(top: Path) -> Row:
    """Peak memory of a process that makes a dataset of a million rows of metadata."""
    file = top / "million.jsonl"
    with open(file, "w", encoding="utf-8") as out:
        for i in range(ROWS):
            row = {"image_path": f"/data/pictures/{i // 1000:04d}/{i:08d}.jpg", "caption": f"an image of thing {i}, soft light, in colors", "image_size": [512 + i % 1088, 512 + i // 7 % 1088]}  # fmt: skip
            out.write(json.dumps(row) + "\n")
    code = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from library.data.dataset_config import read_datasets
from library.data.options import DATA_OPTIONS
from library.data.scan import scan
from library.options import read_options
argv = ["--in_json", {str(file)!r}, "--resolution", "1024", "--enable_bucket", "--max_bucket_reso", "2048"]
options = read_options("", DATA_OPTIONS, argv)
(dataset,) = scan(read_datasets(options)[0])
assert len(dataset.samples) == {ROWS}
print(next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 2**20)
"""
    start = time.perf_counter()
    peak = float(
        subprocess.run(
            [sys.executable, "-c", code], check=True, capture_output=True, text=True
        ).stdout
    )
    seconds = time.perf_counter() - start
    return (
        f"peak memory with a million rows of metadata ({seconds:.0f} s)",
        "1 GB",
        f"{peak * 2**30 / 1e9:.2f} GB",
    )


if __name__ == "__main__":
    main()
