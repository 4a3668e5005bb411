"""Buckets against golden 01, and their properties."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from library.data.buckets import Buckets, BucketSettings, crop_for_conditioning, make_buckets
from library.size import Size

GOLDEN = json.loads((Path(__file__).parent / "golden" / "01_buckets.json").read_text())


def settings_of(
    resolution: Size,
    *,
    enabled: bool = True,
    smallest: int = 256,
    largest: int = 2048,
    step: int = 64,
    no_upscale: bool = False,
) -> BucketSettings:
    return BucketSettings(
        enable_bucket=enabled,
        min_bucket_reso=smallest,
        max_bucket_reso=largest,
        bucket_reso_steps=step,
        bucket_no_upscale=no_upscale,
        resolution=resolution,
    )


@pytest.mark.parametrize(
    "config", GOLDEN["configs"], ids=lambda c: f"{c['max_reso']} {c['steps']} {c['no_upscale']}"
)
def test_golden_01(config):
    settings = settings_of(
        Size(*config["max_reso"]),
        smallest=config["min_size"],
        largest=config["max_size"],
        step=config["steps"],
        no_upscale=config["no_upscale"],
    )
    buckets = Buckets(settings)
    if not config["no_upscale"]:
        assert [list(size) for size in buckets.sizes] == config["resolutions"]
    for width, height, bucket, resized, error, crop, *_ in config["images"]:
        image = Size(width, height)
        fit = buckets.fit(image)
        assert [list(fit.bucket), list(fit.resized)] == [bucket, resized], image
        if 0 not in bucket:
            assert fit.bucket.aspect - image.aspect == pytest.approx(error, abs=1e-12)
            assert [int(side) for side in crop_for_conditioning(image, fit.bucket)] == crop, image


sides = st.integers(1, 12000)


@given(width=sides, height=sides, step=st.sampled_from([32, 64]))
def test_the_resize_covers_the_bucket_and_no_bucket_is_too_large(width, height, step):
    buckets = Buckets(settings_of(Size(1024, 1024), step=step))
    fit = buckets.fit(Size(width, height))
    assert fit.bucket in buckets.sizes and fit.bucket.area <= 1024 * 1024
    assert fit.resized.width >= fit.bucket.width and fit.resized.height >= fit.bucket.height
    assert fit.bucket.width % step == fit.bucket.height % step == 0


@given(width=sides, height=sides)
def test_without_upscaling_no_image_is_enlarged(width, height):
    fit = Buckets(settings_of(Size(1024, 1024), no_upscale=True)).fit(Size(width, height))
    # Rounding to whole pixels may add one.
    assert fit.resized.width <= width + 1 and fit.resized.height <= height + 1
    assert fit.bucket.width <= fit.resized.width and fit.bucket.height <= fit.resized.height


def test_without_buckets_every_image_covers_the_resolution():
    fit = Buckets(settings_of(Size(512, 256), enabled=False)).fit(Size(300, 300))
    assert fit.bucket == Size(512, 256) and fit.resized == Size(512, 512)


def test_buckets_are_sorted_and_hold_the_square():
    buckets = make_buckets(Size(1024, 1024), 512, 2048, 64)
    assert buckets == sorted(buckets) and Size(1024, 1024) in buckets
