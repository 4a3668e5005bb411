"""Caches: the contract's files, validity by shape, damage, and filling them."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from messages import mentioning, mentions
from PIL import Image
from scanning import samples_of, scanned, stub_text, stub_vae
from tolerance import assert_network

from library.data.augment import load_pixels
from library.data.cache import npz
from library.data.cache.audit import audit, refuse_or_skip
from library.data.cache.disk import source_stamp
from library.data.cache.fill import fill_latents, fill_text
from library.data.cache.latents import Latents, LatentsInMemory, LatentsOnDisk
from library.data.cache.text import CaptionVariants, TextInMemory, TextOnDisk
from library.data.file_index import FileIndex
from library.errors import RunError
from library.models import vae
from library.models.text_encoders import EncodedText

GOLDEN = Path(__file__).parent / "golden" / "10_training"
BROKEN = "unreadable|read|damaged|corrupt"


def samples_in(folder: Path, *argv: object):
    return samples_of(scanned(folder, *argv))


@pytest.fixture
def samples(images):
    return samples_in(images)


# ------------------------------------------------------------------------------------------------------- the golden files


def test_golden_10_caches_of_the_reference_are_valid_and_read(golden_data):
    samples = samples_in(golden_data / "data")
    for file in (GOLDEN / "caches").iterdir():
        (golden_data / "data" / file.name).write_bytes(file.read_bytes())
    latents, text = LatentsOnDisk(), TextOnDisk(77)
    for sample in samples:
        assert latents.invalid_reason(sample) is None, latents.invalid_reason(sample)
        assert latents.read(sample)[0].shape == (
            4,
            sample.fit.bucket.height // 8,
            sample.fit.bucket.width // 8,
        )
    # Their pooled vector may be wrong, so they are made again unless the user trusts them.
    assert all(text.invalid_reason(sample) is not None for sample in samples[:2])
    trusted = TextOnDisk(77, trusted=True)
    assert [trusted.invalid_reason(sample) is None for sample in samples[:3]] == [True, True, False]
    assert trusted.read(samples[0], 0).pooled.shape == (128,)


def test_golden_10_our_caches_hold_what_the_references_hold(golden_data, golden_models):
    """Latents within the posterior (it is one random sample); sizes and crop exact; text by the rule."""
    samples = samples_in(golden_data / "data")
    latents, text = LatentsOnDisk(), TextOnDisk(77)
    assert (
        fill_latents(samples, latents, lambda *inputs: vae.encode(golden_models.vae, *inputs), 2)
        == []
    )
    with torch.no_grad():
        fill_text(samples[:2], text, lambda captions: golden_models.encode_texts(captions, 75))
    for sample in samples:
        ours, golden = (
            np.load(sample.latents_file),
            np.load(GOLDEN / "caches" / sample.latents_file.name),
        )
        assert {name: ours[name].dtype for name in ours if name != "fingerprint"} == {
            name: golden[name].dtype for name in golden
        }
        assert np.array_equal(ours["original_size"], golden["original_size"])
        assert np.array_equal(ours["crop_ltrb"], golden["crop_ltrb"])
        image = torch.from_numpy(load_pixels(sample).rgb.copy()).permute(2, 0, 1)[None] / 127.5 - 1
        posterior = golden_models.vae.encode(image).latent_dist
        for z in (ours["latents"], golden["latents"]):
            assert ((torch.from_numpy(z) - posterior.mean[0]) / posterior.std[0]).abs().max() < 6
    for sample in samples[:2]:
        ours, golden = np.load(sample.text_file), np.load(GOLDEN / "caches" / sample.text_file.name)
        assert set(ours) - {"fingerprint"} == set(golden)
        for name in golden:
            assert_network(torch.from_numpy(ours[name]), torch.from_numpy(golden[name]), name)


# ------------------------------------------------------------------------------------------------------------- validity


def test_what_was_written_is_read_back(samples):
    cache = LatentsOnDisk()
    latents = torch.randn(4, samples[0].fit.bucket.height // 8, samples[0].fit.bucket.width // 8)
    assert cache.invalid_reason(samples[0]) is not None
    cache.write(samples[0], Latents(latents), source_stamp(samples[0].path)[1])
    assert cache.invalid_reason(samples[0]) is None and torch.equal(
        cache.read(samples[0])[0], latents
    )
    text = EncodedText(
        torch.randn(77, 8).bfloat16(), torch.randn(77, 16).bfloat16(), torch.randn(16).bfloat16()
    )
    TextOnDisk(77).write(samples[0], [text])
    back = TextOnDisk(77).read(samples[0], 0)
    assert all(torch.equal(one, two.float()) for one, two in zip(back, text, strict=True))
    assert np.load(samples[0].text_file)["pool2"].dtype == np.float32
    assert mentions(TextOnDisk(152).invalid_reason(samples[0]), "hidden_state1", "77x8", "152x?")


@pytest.mark.parametrize(
    "damage, tokens",
    [
        (lambda path: path.write_bytes(b""), [BROKEN]),
        (lambda path: path.write_bytes(path.read_bytes()[:-30]), [BROKEN]),
        (lambda path: path.write_bytes(b"\0" * 1000), [BROKEN]),
        (lambda path: np.savez(path, other=np.zeros(3)), ["latents"]),
        (lambda path: np.savez(path, latents=np.array([{}], dtype=object)), ["latents", "object"]),
        (
            lambda path: np.savez(path, latents=np.zeros((4, 99, 99), np.float32)),
            ["latents", "4x99x99"],
        ),
    ],
)
def test_fault_45_a_file_that_isnt_valid_is_told_why_and_made_again(damage, tokens, samples):
    cache = LatentsOnDisk()
    fill_latents(samples, cache, stub_vae, 2)
    good = cache.read(samples[0])[0]
    damage(samples[0].latents_file)
    assert mentions(cache.invalid_reason(samples[0]), *tokens)
    assert fill_latents(samples, cache, stub_vae, 2) == []
    assert torch.equal(cache.read(samples[0])[0], good)


def test_arrays_are_read_however_another_program_laid_them_out(tmp_path):
    arrays = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.float64(2.5),
        "c": np.arange(4).reshape(2, 2).T,
    }
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "x.npz", **arrays)
        found = npz.read(tmp_path / "x.npz", list(arrays))
        for name, array in arrays.items():
            assert (
                np.array_equal(found[name], array) and found[name].dtype == np.asarray(array).dtype
            )
            assert found[name].flags.writeable


def test_objects_and_damaged_arrays_are_never_read(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, a=np.array([{}], dtype=object))
    with pytest.raises(npz.NpzError):
        npz.read(path, ["a"])
    npz.write(path, {"a": np.zeros(1000, np.float32)}, {})
    raw = bytearray(path.read_bytes())
    raw[1000] ^= 1
    path.write_bytes(raw)
    with pytest.raises(npz.NpzError, match="CRC"):
        npz.read(path, ["a"])
    with pytest.raises(npz.NpzError):
        npz.read(tmp_path / "missing.npz", ["a"])


def test_fault_43_another_resolution_makes_the_latents_again(images):
    cache = LatentsOnDisk()
    fill_latents(samples_in(images), cache, stub_vae, 2)
    smaller = samples_in(images, "--resolution", 96)
    assert all(mentions(cache.invalid_reason(sample), "latents") for sample in smaller)


def test_fault_46_flip_aug_switched_on_later_makes_the_latents_again(images):
    cache = LatentsOnDisk()
    fill_latents(samples_in(images), cache, stub_vae, 2)
    flipped = samples_in(images, "--flip_aug")
    assert all(mentions(cache.invalid_reason(sample), "latents_flipped") for sample in flipped)
    fill_latents(flipped, cache, stub_vae, 2)
    plain, mirrored = (cache.read(flipped[0], flipped=flip)[0] for flip in (False, True))
    assert (mirrored - plain.flip(-1)).abs().max() < 0.1 and not torch.equal(mirrored, plain)


# --------------------------------------------------------------------------------------------------------------- filling


def test_only_what_is_missing_is_encoded_in_batches_of_one_bucket(samples):
    calls = []

    def encode(images, noise):
        calls.append(tuple(images.shape))
        return stub_vae(images, noise)

    cache = LatentsOnDisk()
    fill_latents(samples, cache, encode, 4)
    assert len(calls) == len({sample.fit.bucket for sample in samples})
    samples[0].latents_file.unlink()
    calls.clear()
    fill_latents(samples, cache, encode, 4)
    assert [shape[0] for shape in calls] == [1]


def test_the_posterior_sample_depends_on_the_image_alone(samples):
    """Not on its batch, its neighbours or the run: caches made again are the same."""
    found = []
    for batch_size, part in ((1, samples), (4, list(reversed(samples)))):
        cache = LatentsInMemory()
        fill_latents(part, cache, stub_vae, batch_size)
        found.append([cache.read(sample)[0] for sample in samples])
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


def test_processes_share_what_goes_to_the_disk(samples):
    cache = LatentsOnDisk()
    fill_latents(samples, cache, stub_vae, 1, rank=0, world_size=2)
    assert [cache.invalid_reason(sample) is None for sample in samples] == [
        True,
        False,
        True,
        False,
    ]


def test_equal_captions_are_encoded_once(samples):
    seen = []

    def encode(captions):
        seen.extend(captions)
        return stub_text(captions)

    fill_text(samples + samples, TextInMemory(CaptionVariants()), encode)
    assert sorted(seen) == sorted({sample.caption for sample in samples})


def test_prefix_and_suffix_are_part_of_a_cached_caption(images):
    (sample, *_) = samples_in(images, "--caption_prefix", "photo:", "--caption_suffix", "end")
    assert CaptionVariants().texts(sample) == (f"photo: {sample.caption} end",)


def test_fault_33_latents_that_arent_finite_are_never_cached_and_the_image_is_named(samples):
    def overflowing(images, noise):
        latents = stub_vae(images, noise)
        latents[0, 0, 0, 0] = float("nan")
        return latents

    cache = LatentsOnDisk()
    bad = fill_latents(samples, cache, overflowing, 1)
    assert len(bad) == len(samples) and not list(samples[0].path.parent.glob("*.npz"))
    with pytest.raises(RunError, match=mentioning("picture0.png", "VAE", "finite|NaN|Inf")):
        refuse_or_skip(bad, skip=False)


def test_fault_25_every_image_that_cant_be_decoded_is_told_before_training(samples, caplog):
    logging.getLogger("library").propagate = True
    for sample in samples[:2]:
        raw = sample.path.read_bytes()
        sample.path.write_bytes(raw[:60] + b"\0" * (len(raw) - 60))
    for bad in (audit(samples, FileIndex()), fill_latents(samples, LatentsInMemory(), stub_vae, 4)):
        assert {one.sample.file for one in bad} == {sample.file for sample in samples[:2]}
    with pytest.raises(RunError) as error:
        refuse_or_skip(bad, skip=False)
    assert all(
        sample.path.name in str(error.value) for sample in samples[:2]
    ) and "--skip_bad_images" in str(error.value)
    refuse_or_skip(bad, skip=True)
    assert all(mentions(caplog.text, sample.path.name) for sample in samples[:2]) and mentions(
        caplog.text, "--skip_bad_images"
    )


def test_a_picture_replaced_since_the_scan_is_told(samples):
    with Image.open(samples[0].path) as image:
        size = "x".join(map(str, image.size))
    Image.new("RGB", (33, 44)).save(samples[0].path)
    (bad,) = audit(samples[:1], FileIndex())
    assert mentions(bad.reason, size, "33x44")


@pytest.mark.parametrize("batch_size, expected", [(1, {1}), (4, {4}), (3, {2})])
def test_mirrored_twins_are_encoded_with_their_images_in_batches_of_the_size_asked_for(
    batch_size, expected, tmp_path
):
    from tools.make_tiny_dataset import make_images

    paths = make_images(tmp_path / "1_x", 4)
    for path in paths[1:]:
        path.write_bytes(paths[0].read_bytes())
    samples = samples_in(tmp_path, "--flip_aug")
    calls = []

    def encode(images, noise):
        calls.append(images)
        return stub_vae(images, noise)

    fill_latents(samples, LatentsInMemory(), encode, batch_size)
    assert {len(images) for images in calls} == expected and sum(map(len, calls)) == 8
    if batch_size == 4:
        assert torch.equal(calls[0][0], calls[0][2].flip(-1)) and torch.equal(
            calls[0][1], calls[0][3].flip(-1)
        )
