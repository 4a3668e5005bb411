"""Pixels of a sample: crops, augmentations, masks, and what the model is told of them."""

import random
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from messages import mentions
from PIL import Image
from scanning import samples_of, scanned

from library.data.augment import color_augmented, face_crop, load_conditioning, load_pixels
from library.data.samples import Face, PixelSettings, Sample
from library.images import normalized
from library.size import Size

BUCKET = [
    "--enable_bucket",
    "--bucket_reso_steps",
    32,
    "--min_bucket_reso",
    64,
    "--max_bucket_reso",
    256,
]


def image(folder: Path, name: str, size: tuple[int, int], mode: str = "RGB") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    channels = {"RGB": 3, "RGBA": 4}[mode]
    noise = np.random.default_rng(1).integers(0, 256, (size[1], size[0], channels), dtype=np.uint8)
    Image.fromarray(noise, mode).save(folder / name)
    return folder / name


def sample_of(folder: Path, **pixels) -> Sample:
    (sample,) = samples_of(scanned(folder))
    return replace(sample, subset=replace(sample.subset, pixels=PixelSettings(**pixels)))


def test_without_draws_the_middle_is_cropped(tmp_path):
    image(tmp_path / "1_x", "a.png", (200, 120))
    sample = sample_of(tmp_path, random_crop=True, color_aug=True)
    bucket, resized = sample.fit
    whole = cv2.resize(np.asarray(Image.open(sample.path)), resized, interpolation=cv2.INTER_AREA)
    left, top = (resized.width - bucket.width) // 2, (resized.height - bucket.height) // 2
    found = load_pixels(sample)
    assert np.array_equal(found.rgb, whole[top : top + bucket.height, left : left + bucket.width])
    assert found.crop_top_left == sample.crop_top_left(flipped=False)


def test_random_crop_tells_the_model_the_corner_it_cut(tmp_path):
    """SDXL (arXiv:2307.01952) section 2.2: c_top and c_left are the pixels cropped at the top and left of the resized image."""
    image(tmp_path / "1_x", "a.png", (200, 150))
    sample = sample_of(tmp_path, random_crop=True)
    bucket, resized = sample.fit
    whole = cv2.resize(np.asarray(Image.open(sample.path)), resized, interpolation=cv2.INTER_AREA)
    corners = set()
    for seed in range(40):
        top, left = load_pixels(sample, random.Random(seed)).crop_top_left
        assert np.array_equal(load_pixels(sample, random.Random(seed)).rgb, whole[top : top + bucket.height, left : left + bucket.width])  # fmt: skip
        mirrored = load_pixels(sample, random.Random(seed), flipped=True)
        m_top, m_left = mirrored.crop_top_left
        assert np.array_equal(mirrored.rgb, whole[:, ::-1][m_top : m_top + bucket.height, m_left : m_left + bucket.width])  # fmt: skip
        corners.add((top, left))
    assert len(corners) > 5 and {left for _, left in corners} <= set(
        range(resized.width - bucket.width + 1)
    )


def test_alpha_becomes_a_mask_and_is_mirrored_with_the_image(tmp_path):
    path = image(tmp_path / "1_x", "a.png", (160, 160), "RGBA")
    sample = sample_of(tmp_path, alpha_mask=True)
    raw = cv2.resize(np.asarray(Image.open(path)), sample.fit.resized, interpolation=cv2.INTER_AREA)
    found = load_pixels(sample)
    assert np.array_equal(found.rgb, raw[..., :3])  # the file's own colors, not laid on white
    np.testing.assert_allclose(found.alpha, raw[..., 3] / 255, atol=1e-7)
    assert np.array_equal(load_pixels(sample, flipped=True).alpha, found.alpha[:, ::-1])
    Image.open(path).convert("RGB").save(path)
    assert load_pixels(sample).alpha.min() == 1.0  # an image without alpha counts whole


def test_a_conditioning_image_is_resized_cropped_and_mirrored_as_its_image(tmp_path):
    image(tmp_path / "1_x", "a.png", (200, 120))
    sample = replace(sample_of(tmp_path), conditioning=str(tmp_path / "1_x" / "a.png"))
    assert np.array_equal(load_conditioning(sample, flipped=False), load_pixels(sample).rgb)
    assert np.array_equal(
        load_conditioning(sample, flipped=True), load_pixels(sample, flipped=True).rgb
    )


def test_color_aug_changes_a_third_of_the_samples_a_little():
    rgb = np.random.default_rng(0).integers(60, 200, (16, 16, 3), dtype=np.uint8)
    changed = [
        not np.array_equal(color_augmented(rgb, random.Random(seed)), rgb) for seed in range(600)
    ]
    assert 0.27 < np.mean(changed) < 0.39
    hues, gammas = 0, 0
    for seed in range(200):
        draw = random.Random(seed)
        if draw.random() >= 0.33:
            continue
        found = color_augmented(rgb, random.Random(seed))
        if draw.random() < 0.5:
            shift = draw.uniform(-8, 8)
            hsv = cv2.cvtColor(rgb, cv2.COLOR_BGR2HSV)
            hsv[..., 0] = (hsv[..., 0] + shift) % 180
            expected, hues = cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR), hues + 1
        else:
            gamma = draw.uniform(0.95, 1.05)
            expected, gammas = (
                (rgb.astype(np.float32) ** gamma).clip(0, 255).astype(np.uint8),
                gammas + 1,
            )
        assert np.array_equal(found, expected)
    assert hues > 10 and gammas > 10


def test_a_face_crop_by_hand():
    """Contract, dataset_config.md section 6: image 400x300, target 100x100, face of 80 at (300, 60), range 1..2."""
    # low = max(100/400, 100/300, 100/(80*2)) = 0.625, high = min(1, 100/(80*1)) = 1
    for seed in range(20):
        scale = random.Random(seed).uniform(0.625, 1.0)
        resized, (top, left) = face_crop(Size(400, 300), Size(100, 100), Face(300, 60, 80, 40), (1.0, 2.0), random.Random(seed), wide=False)  # fmt: skip
        assert resized == Size(int(400 * scale + 0.5), int(300 * scale + 0.5))
        assert abs(left - (300 * scale - 50)) <= 5 and 0 <= top <= resized.height - 100
        assert abs(top - max(0, 60 * scale - 50)) <= 5
    fixed, corner = face_crop(Size(400, 300), Size(100, 100), Face(300, 60, 80, 40), (2.0, 2.0), random.Random(0), wide=False)  # fmt: skip
    assert fixed == Size(250, 188) and corner == (
        0,
        138,
    )  # no shaking where the range is one number


def test_face_crops_are_used_without_buckets_and_cache(tmp_path):
    image(tmp_path / "1_x", "a_150_60_80_80.png", (200, 120))
    (sample,) = samples_of(
        scanned(tmp_path, "--face_crop_aug_range", "1.0,2.0", "--resolution", 64, buckets=[])
    )
    assert (
        sample.face == Face(150, 60, 80, 80)
        and replace(sample, file="IMG_2020_01_00_00.png").face is None
    )
    shown = {load_pixels(sample, random.Random(seed)).rgb.tobytes() for seed in range(8)}
    assert len(shown) > 4 and load_pixels(sample).rgb.shape == (64, 64, 3)


@pytest.mark.parametrize("profile", [b"no profile", b"\0" * 200])
def test_fault_32_a_broken_color_profile_does_no_harm(profile, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    (tmp_path / "1_x").mkdir()
    Image.fromarray(noise).save(tmp_path / "1_x" / "a.png", icc_profile=profile)
    (sample,) = samples_of(scanned(tmp_path))
    assert np.array_equal(load_pixels(sample).rgb, noise)


def test_fault_30_the_first_frame_of_an_animated_image_is_used_and_told(tmp_path, caplog):
    import logging

    logging.getLogger("library").propagate = True
    (tmp_path / "1_x").mkdir()
    frames = [Image.new("RGB", (128, 128), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "1_x" / "a.png", save_all=True, append_images=frames[1:])
    (sample,) = samples_of(scanned(tmp_path))
    assert load_pixels(sample).rgb[0, 0].tolist() == [255, 0, 0]
    assert mentions(caplog.text, "WARNING", "1", "animated", "frame")


def test_the_range_of_values_that_the_vae_gets(tmp_path):
    image(tmp_path / "1_x", "a.png", (128, 128))
    values = normalized(load_pixels(sample_of(tmp_path)).rgb)
    assert values.dtype == np.float32 and -1 <= values.min() < -0.9 and 0.9 < values.max() <= 1
