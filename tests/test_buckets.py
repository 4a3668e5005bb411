"""Buckets against golden 01, and their properties."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from library.data.buckets import BucketPlan, Buckets, crop_for_conditioning, make_buckets
from library.size import Size

GOLDEN = json.loads((Path(__file__).parent / "golden" / "01_buckets.json").read_text())


def plan_of(config: dict) -> BucketPlan:
    return BucketPlan(
        Size(*config["max_reso"]), True, config["min_size"], config["max_size"], config["steps"], config["no_upscale"]
    )


@pytest.mark.parametrize("config", GOLDEN["configs"], ids=lambda c: f"{c['max_reso']} {c['steps']} {c['no_upscale']}")
def test_golden_01(config):
    buckets = Buckets(plan_of(config))
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
    buckets = Buckets(BucketPlan(Size(1024, 1024), True, 256, 2048, step, False))
    fit = buckets.fit(Size(width, height))
    assert fit.bucket in buckets.sizes and fit.bucket.area <= 1024 * 1024
    assert fit.resized.width >= fit.bucket.width and fit.resized.height >= fit.bucket.height
    assert fit.bucket.width % step == fit.bucket.height % step == 0


@given(width=sides, height=sides)
def test_without_upscaling_no_image_is_enlarged(width, height):
    fit = Buckets(BucketPlan(Size(1024, 1024), True, 256, 2048, 64, True)).fit(Size(width, height))
    # Rounding to whole pixels may add one.
    assert fit.resized.width <= width + 1 and fit.resized.height <= height + 1
    assert fit.bucket.width <= fit.resized.width and fit.bucket.height <= fit.resized.height


def test_without_buckets_every_image_covers_the_resolution():
    fit = Buckets(BucketPlan(Size(512, 256), False, 0, 0, 64, False)).fit(Size(300, 300))
    assert fit.bucket == Size(512, 256) and fit.resized == Size(512, 512)


def test_buckets_are_sorted_and_hold_the_square():
    buckets = make_buckets(Size(1024, 1024), 512, 2048, 64)
    assert buckets == sorted(buckets) and Size(1024, 1024) in buckets
