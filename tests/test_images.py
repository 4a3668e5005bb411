"""Images: header sizes, EXIF, odd modes, damage, resizing."""

import io
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from library.data.augment import crop
from library.images import ImageError, load, normalized, read_image_info, resize
from library.size import Size


@pytest.fixture
def noise() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (40, 80, 3), dtype=np.uint8)


@pytest.mark.parametrize("ending", [".png", ".jpg", ".webp", ".bmp", ".avif"])
def test_every_format_gives_its_size_and_pixels(noise, ending, tmp_path):
    path = tmp_path / f"x{ending}"
    Image.fromarray(noise).save(path, **({"lossless": True} if ending == ".webp" else {}))
    assert read_image_info(path).size == Size(80, 40)
    pixels = load(path)
    assert pixels.shape == (40, 80, 3)
    if ending in (".png", ".bmp", ".webp"):
        assert np.array_equal(pixels, noise)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", [".jpg", ".png"])
def test_fault_29_exif_orientation_is_applied_to_size_and_pixels(
    noise, orientation, ending, tmp_path
):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(noise).save(tmp_path / f"x{ending}", exif=exif)
    size = read_image_info(tmp_path / f"x{ending}").size
    assert size == (Size(40, 80) if orientation >= 5 else Size(80, 40))
    assert load(tmp_path / f"x{ending}").shape == (size.height, size.width, 3)
    if ending == ".png":
        with Image.open(tmp_path / "x.png") as image:
            assert np.array_equal(
                load(tmp_path / "x.png"), np.asarray(ImageOps.exif_transpose(image))
            )


def test_exif_behind_the_pixels_of_a_png_is_found_without_decoding_it(noise, tmp_path, monkeypatch):
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "png")
    exif = Image.Exif()
    exif[0x0112] = 6
    content = exif.tobytes().removeprefix(b"Exif\0\0")
    chunk = len(content).to_bytes(4, "big") + b"eXIf" + content
    chunk += zlib.crc32(chunk[4:]).to_bytes(4, "big")
    end = buffer.getvalue().rindex(b"IEND") - 4
    (tmp_path / "x.png").write_bytes(buffer.getvalue()[:end] + chunk + buffer.getvalue()[end:])
    assert load(tmp_path / "x.png").shape == (80, 40, 3)
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", lambda self: pytest.fail("decoded"))
    assert read_image_info(tmp_path / "x.png").size == Size(40, 80)


def test_fault_27_sixteen_bit_images_are_scaled_not_clipped(tmp_path):
    Image.fromarray(np.full((4, 4), 30_000, dtype=np.uint16)).save(tmp_path / "x.png")
    assert load(tmp_path / "x.png").mean() == round(30_000 / 257)


@pytest.mark.parametrize(
    "mode, color, expected",
    [
        ("RGBA", (200, 0, 0, 0), (255, 255, 255)),
        ("RGBA", (200, 0, 0, 255), (200, 0, 0)),
        ("LA", (10, 0), (255, 255, 255)),
        ("L", 10, (10, 10, 10)),
        ("1", 1, (255, 255, 255)),
        ("P", 0, (0, 0, 0)),
        ("CMYK", (0, 255, 255, 0), (255, 0, 0)),
    ],
)
def test_fault_28_other_modes_become_rgb_and_what_is_transparent_white(
    mode, color, expected, tmp_path
):
    path = tmp_path / ("x.jpg" if mode == "CMYK" else "x.png")
    Image.new(mode, (8, 8), color).save(path)
    assert np.abs(load(path).reshape(-1, 3).astype(int) - expected).max() <= 2


def damaged() -> dict[str, bytes]:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(
        buffer, "png"
    )
    png = buffer.getvalue()
    return {
        "empty": b"",
        "text": b"this is not an image",
        "cut": png[: len(png) // 2],
        "zero tail": png[: len(png) // 2] + b"\0" * (len(png) // 2),
    }


@pytest.mark.parametrize("kind", list(damaged()))
def test_fault_25_a_damaged_image_is_told_with_a_reason(kind, tmp_path):
    path = tmp_path / "x.png"
    path.write_bytes(damaged()[kind])
    with pytest.raises(ImageError, match=r"damaged|not an image"):
        load(path)


def test_resizing_is_opencvs_area_when_both_sides_shrink_else_pillows_lanczos(noise):
    assert np.array_equal(
        resize(noise, Size(30, 20)), cv2.resize(noise, (30, 20), interpolation=cv2.INTER_AREA)
    )
    assert np.array_equal(
        resize(noise, Size(90, 20)),
        np.asarray(Image.fromarray(noise).resize((90, 20), Image.Resampling.LANCZOS)),
    )
    assert resize(noise, Size(80, 40)) is noise


def test_area_resizing_is_the_mean_of_the_covered_area(noise):
    """By hand, with one matrix of covered shares per axis (contract: at most 1 level off in 2 % of the values)."""

    def shares(size: int, target: int) -> np.ndarray:
        edges = np.arange(target + 1) * size / target
        low, high = np.arange(size), np.arange(1, size + 1)
        covered = np.minimum(high, edges[1:, None]) - np.maximum(low, edges[:-1, None])
        return np.clip(covered, 0, None) * target / size

    expected = np.einsum("ah,hwc,bw->abc", shares(40, 17), noise.astype(float), shares(80, 33))
    found = resize(noise, Size(33, 17))
    assert (
        np.abs(found - expected).max() <= 1.01
        and (np.abs(found - expected.round()) > 0).mean() <= 0.02
    )


@pytest.mark.parametrize(
    "name", ["nearest", "bilinear", "linear", "bicubic", "cubic", "area", "box", "lanczos"]
)
def test_every_interpolation_keeps_a_flat_image_flat(name):
    flat = np.full((20, 30, 3), 77, dtype=np.uint8)
    assert np.array_equal(resize(flat, Size(41, 13), name), np.full((13, 41, 3), 77))


def test_crop_and_normalize(noise):
    cropped = crop(noise, Size(40, 30), None)
    assert np.array_equal(cropped, noise[5:35, 20:60])
    values = normalized(np.array([[[0, 255, 51]]], dtype=np.uint8))
    np.testing.assert_allclose(values[:, 0, 0], [-1.0, 1.0, -0.6], atol=1e-6)


def test_conditioning_images_of_the_golden_run_are_read(golden_data: Path):
    assert read_image_info(golden_data / "data" / "img1.png").size == Size(192, 256)


# ------------------------------------------------------------------------------------------------------------ headers

NOISE = np.random.default_rng(0).integers(0, 256, (40, 80, 3), dtype=np.uint8)
EXIF = b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
RAW_PROFILE = b"\nexif\n      32\n" + (b"Exif\0\0" + EXIF).hex().encode() + b"\n"
XMP = b'<x tiff:Orientation="6"/>'


def chunk(kind: bytes, content: bytes) -> bytes:
    return (
        len(content).to_bytes(4, "big")
        + kind
        + content
        + zlib.crc32(kind + content).to_bytes(4, "big")
    )


XMP_CHUNK = chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP)


def png(*before_pixels: bytes) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(NOISE).save(buffer, "png")
    raw = buffer.getvalue()
    return raw[:33] + b"".join(before_pixels) + raw[33:]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["png", "jpg"])
def test_headers_are_read_without_the_pixels(orientation, ending, tmp_path, monkeypatch):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"x.{ending}"
    Image.fromarray(NOISE).save(
        path, exif=exif, icc_profile=b"x" * 9000
    )  # a profile before the size
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    assert read_image_info(path) == (
        Size(40, 80) if orientation >= 5 else Size(80, 40),
        orientation > 1,
        False,
    )


def test_a_png_without_exif_is_not_decoded_for_its_size(tmp_path, monkeypatch):
    (tmp_path / "x.png").write_bytes(png(chunk(b"iTXt", b"Title\0\0\0\0\0" + XMP)))
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", lambda self: pytest.fail("decoded"))
    assert read_image_info(tmp_path / "x.png") == (Size(80, 40), False, False)


def test_the_previews_in_a_cameras_file_are_no_animation(tmp_path):
    preview = Image.fromarray(NOISE[::2, ::2])
    Image.fromarray(NOISE).save(
        tmp_path / "x.jpg", format="MPO", save_all=True, append_images=[preview]
    )
    assert read_image_info(tmp_path / "x.jpg") == (Size(80, 40), False, False)


def test_big_endian_exif_and_xmp_count_too(tmp_path):
    (tmp_path / "exif.png").write_bytes(png(chunk(b"eXIf", EXIF)))
    assert read_image_info(tmp_path / "exif.png").size == Size(40, 80)
    (tmp_path / "xmp.png").write_bytes(png(XMP_CHUNK))
    assert read_image_info(tmp_path / "xmp.png").size == Size(40, 80)
    with Image.open(tmp_path / "xmp.png") as image:
        image.load()
        assert image.getexif()[0x0112] == 6


@pytest.mark.parametrize("is_behind_pixels", [False, True])
@pytest.mark.parametrize(
    "text",
    [
        chunk(b"tEXt", b"Raw profile type exif\0" + RAW_PROFILE),
        chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(RAW_PROFILE)),
        XMP_CHUNK,
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\x01\0\0\0" + zlib.compress(XMP)),
    ],
    ids=["raw profile", "compressed raw profile", "XMP", "compressed XMP"],
)
def test_orientation_in_text_chunks_turns_size_and_pixels(text, is_behind_pixels, tmp_path):
    raw, path = png(), tmp_path / "x.png"
    at = raw.rindex(b"IEND") - 4 if is_behind_pixels else 33
    path.write_bytes(raw[:at] + text + raw[at:])
    assert read_image_info(path) == (Size(40, 80), True, False)
    assert load(path).shape == (80, 40, 3)


@pytest.mark.parametrize("xmp, size", [(b"", Size(80, 40)), (XMP, Size(40, 80))])
@pytest.mark.parametrize("ending", ["png", "jpg", "webp"])
@pytest.mark.parametrize("broken", [b"\0" * 20, b"II*\0", b"II*\0\x08\0", b"no TIFF file at all"])
def test_broken_exif_counts_as_none(broken, ending, xmp, size, tmp_path):
    path = tmp_path / f"x.{ending}"
    if ending == "png":
        path.write_bytes(png(chunk(b"eXIf", broken), *([XMP_CHUNK] if xmp else [])))
    else:
        Image.fromarray(NOISE).save(path, exif=b"Exif\0\0" + broken, xmp=xmp)
    assert read_image_info(path).size == size
    assert load(path).shape == (size.height, size.width, 3)


def test_letters_in_the_pixels_are_no_exif(tmp_path):
    raw = png()
    at = raw.rindex(b"IEND") - 4
    fake = chunk(
        b"zzZz", b"....eXIf" + b"MM\0*" * 4
    )  # a private chunk; its content's checksum isn't one of an eXIf
    (tmp_path / "x.png").write_bytes(raw[:at] + fake + raw[at:])
    assert read_image_info(tmp_path / "x.png") == (Size(80, 40), False, False)


@pytest.mark.parametrize(
    "settings", [{"progressive": True}, {"quality": 30}, {"comment": b"y" * 6000}]
)
def test_kinds_of_jpeg(settings, tmp_path):
    Image.fromarray(NOISE).save(tmp_path / "x.jpg", **settings)
    assert read_image_info(tmp_path / "x.jpg").size == Size(80, 40)


@pytest.mark.parametrize(
    "raw",
    [b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"\xff\xd8\xff\xe1\0\x04ab", b"text", png()[:30]],
)
def test_fault_25_a_cut_header_is_reported(raw, tmp_path):
    (tmp_path / "x.png").write_bytes(raw)
    with pytest.raises(ImageError, match=r"damaged|not an image"):
        read_image_info(tmp_path / "x.png")


@pytest.mark.parametrize("ending", ["png", "webp"])
def test_fault_30_animated_images_are_seen_by_their_header(ending, tmp_path):
    frames = [Image.new("RGB", (32, 16), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / f"x.{ending}", save_all=True, append_images=frames[1:], **({"lossless": True} if ending == "webp" else {}))  # fmt: skip
    assert read_image_info(tmp_path / f"x.{ending}") == (Size(32, 16), False, True)
