"""Caches that can't be stale: what changed after caching is made again, each item for itself, and the reason is told."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from messages import mentioning, mentions
from PIL import Image
from running import ROOT
from scanning import samples_of, scanned, stub_text, stub_vae

from library.data.cache.audit import audit
from library.data.cache.fill import fill_latents, fill_text
from library.data.cache.latents import LatentsOnDisk
from library.data.cache.text import CaptionVariants, TextOnDisk
from library.data.file_index import FileIndex, file_stamp
from library.errors import RunError


def samples_in(folder: Path, *argv: object):
    return samples_of(scanned(folder, *argv))


def assert_only(found: list[str | None], at: int, *tokens: str) -> None:
    """Check that one of the samples has a problem, which names the tokens."""
    assert [i for i, problem in enumerate(found) if problem is not None] == [at] and mentions(
        found[at], *tokens
    ), found


def filled(samples, vae: str = "vae", known: FileIndex | None = None) -> LatentsOnDisk:
    cache = LatentsOnDisk(vae, known)
    assert fill_latents(samples, cache, stub_vae, 2) == []
    return cache


def problems(cache, samples) -> list[str | None]:
    return [cache.invalid_reason(sample) for sample in samples]


def contents(folder: Path) -> dict[str, dict[str, np.ndarray]]:
    """Every array of every cache file, fingerprints apart."""
    found = {}
    for file in folder.rglob("*.npz"):
        with np.load(file) as arrays:
            found[file.name] = {name: arrays[name] for name in arrays if name != "fingerprint"}
    return found


# --------------------------------------------------------------------------------------------------------------- latents


def test_what_an_inpainting_model_sees_is_made_of_a_image_and_its_mask(images, tmp_path):
    masks = tmp_path / "masks"
    masks.mkdir()
    for path in images.rglob("*.png"):
        with Image.open(path) as image:
            Image.new("L", image.size, 255).save(masks / path.name)
    samples = samples_in(images, "--conditioning_data_dir", masks)
    filled(samples)
    cache = LatentsOnDisk("vae", for_inpainting=True)
    assert all(mentions(problem, "inpainting") for problem in problems(cache, samples)), (
        "files of runs with other models stay valid for those alone"
    )
    trusted = LatentsOnDisk("vae", trusted=True, for_inpainting=True)
    assert all(mentions(problem, "inpainting") for problem in problems(trusted, samples)), (
        "--skip_cache_check can't make it be there"
    )
    assert fill_latents(samples, cache, stub_vae, 3) == []
    assert (
        problems(cache, samples)
        == problems(LatentsOnDisk("vae"), samples)
        == problems(trusted, samples)
        == [None] * 4
    )
    seen = cache.read(samples[0]).inpainting
    latents = LatentsOnDisk("vae").read(samples[0])
    assert (
        seen.shape == (5, *latents.latents.shape[1:])
        and (seen[0] == 1).all()
        and latents.inpainting is None
    )
    assert seen[1:].abs().max() < 0.1, "everything is hidden: grey, and the posterior's noise"
    mask = Path(samples[2].conditioning)
    with Image.open(mask) as image:
        size = image.size
    Image.new("L", size, 0).save(mask)
    again = LatentsOnDisk("vae", for_inpainting=True)
    assert_only(problems(again, samples), 2, "mask", "chang|differ")
    assert (
        fill_latents(samples, again, stub_vae, 3) == []
        and (again.read(samples[2]).inpainting[0] == 0).all()
    )
    filled_alone = LatentsOnDisk(
        "other"
    )  # a run with another model and VAE makes the files anew, without what it doesn't know
    fill_latents(samples, filled_alone, stub_vae, 2)
    assert "inpainting" not in contents(images)[samples[0].latents_file.name]


def test_fault_42_a_image_replaced_by_one_of_its_size_is_encoded_again_and_no_other(images):
    samples = samples_in(images)
    filled(samples)
    raw = np.asarray(Image.open(samples[1].path))
    Image.fromarray(255 - raw).save(samples[1].path)
    again = samples_in(images)
    assert_only(problems(LatentsOnDisk("vae"), again), 1, "picture|image", "chang|differ")
    before = samples[1].latents_file.read_bytes()
    filled(again)
    assert (
        samples[1].latents_file.read_bytes() != before
        and problems(LatentsOnDisk("vae"), again) == [None] * 4
    )


def test_fault_42_a_image_that_was_only_touched_or_moved_is_not_encoded_again(images, tmp_path):
    samples = samples_in(images)
    filled(samples)
    for sample in samples:
        os.utime(sample.path, (1_500_000_000, 1_500_000_000))
    assert problems(LatentsOnDisk("vae"), samples) == [None] * 4
    images.rename(tmp_path / "moved")
    assert problems(LatentsOnDisk("vae"), samples_in(tmp_path / "moved")) == [None] * 4


@pytest.mark.parametrize(
    "argv, tokens",
    [
        (["--resize_interpolation", "lanczos"], ["resiz"]),
        (["--alpha_mask"], ["alpha_mask"]),
        (["--flip_aug"], ["latents_flipped"]),
        (["--resolution", 160], ["latents"]),
    ],
)
def test_fault_43_another_geometry_makes_the_latents_again(argv, tokens, images):
    filled(samples_in(images))
    changed = samples_in(images, *argv)
    assert any(
        mentions(problem or "", *tokens) for problem in problems(LatentsOnDisk("vae"), changed)
    )
    filled(changed)
    assert problems(LatentsOnDisk("vae"), changed) == [None] * 4


def test_fault_43_the_same_bucket_by_another_resize_is_made_again(images):
    """The shape alone doesn't tell: without upscaling an image may come into a bucket of that size another way."""
    (sample, *_) = samples_in(images)
    filled([sample])
    other = replace(sample, fit=sample.fit._replace(resized=sample.fit.resized._replace(width=999)))
    assert mentions(LatentsOnDisk("vae").invalid_reason(other), "resiz")


def test_fault_44_another_vae_or_dtype_makes_the_latents_again(images):
    samples = samples_in(images)
    filled(samples, "one in float32")
    assert all(
        mentions(problem, "VAE", "dtype")
        for problem in problems(LatentsOnDisk("one in float16"), samples)
    )


def test_arrays_that_another_program_changed_are_seen_though_it_kept_our_fingerprint(images):
    samples = samples_in(images)
    filled(samples)
    file = samples[0].latents_file
    with np.load(file) as arrays:
        kept = {name: arrays[name] for name in arrays}
    np.savez(file, **{**kept, "latents": kept["latents"] + 1})
    assert mentions(LatentsOnDisk("vae").invalid_reason(samples[0]), "chang|modif", "program")


def test_latents_of_sd_scripts_are_accepted_when_newer_than_the_image_and_of_its_size(images):
    (sample, *_) = samples_in(images)
    shape = (4, sample.fit.bucket.height // 8, sample.fit.bucket.width // 8)
    plain = {
        "latents": np.zeros(shape, np.float32),
        "crop_ltrb": np.zeros(4),
        "original_size": np.array(sample.size),
    }
    for name in (sample.latents_file, sample.old_latents_file):
        np.savez(name, **plain)
        assert LatentsOnDisk("vae").invalid_reason(sample) is None
        np.savez(name, **{**plain, "original_size": np.array([1, 2])})
        assert (
            mentions(LatentsOnDisk("vae").invalid_reason(sample), "picture|image", "size")
            or name == sample.old_latents_file
        )
        name.unlink()


def test_fault_33_latents_of_sd_scripts_that_arent_finite_are_made_again(images):
    (sample, *_) = samples_in(images)
    shape = (4, sample.fit.bucket.height // 8, sample.fit.bucket.width // 8)
    np.savez(sample.latents_file, latents=np.full(shape, np.nan, np.float32))
    assert mentions(LatentsOnDisk("vae").invalid_reason(sample), "finite|NaN|Inf")


def test_foreign_arrays_of_a_file_are_kept(images):
    (sample, *_) = samples_in(images)
    np.savez(sample.latents_file, latents_64x64=np.arange(3))
    filled([sample])
    with np.load(sample.latents_file) as arrays:
        assert arrays["latents_64x64"].tolist() == [0, 1, 2] and "latents" in arrays


def flip_byte(file: Path) -> None:
    raw = bytearray(file.read_bytes())
    at = raw.index(b"latents.npy") + 300
    raw[at] ^= 0xFF
    file.write_bytes(raw)


def claim_terabytes(file: Path) -> None:
    """A header of the array's length that speaks of a far larger one."""
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000, 1000000), }"
    npy = b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little") + header.ljust(117) + b"\n"
    import zipfile

    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("latents.npy", npy)


@pytest.mark.parametrize(
    "damage",
    [
        flip_byte,
        claim_terabytes,
        lambda file: file.write_bytes(b""),
        lambda file: file.write_bytes(file.read_bytes()[:-100]),
        lambda file: np.savez(file, latents=np.array([{}], dtype=object)),
        lambda file: file.write_bytes(b"PK" + bytes(500)),
        lambda file: np.savez(file, something=np.zeros(2)),
    ],
    ids=["flipped byte", "terabytes", "empty", "torn", "object", "zeros", "foreign"],
)
def test_fault_45_a_bad_file_is_made_again_for_itself(damage, images):
    samples = samples_in(images)
    filled(samples)
    good = contents(images)
    damage(samples[2].latents_file)
    cache = LatentsOnDisk("vae")
    assert [problem is None for problem in problems(cache, samples)] == [True, True, False, True]
    filled(samples)
    now = contents(images)
    now[samples[2].latents_file.name].pop("something", None)  # foreign arrays stay
    for name, arrays in good.items():
        assert arrays.keys() == now[name].keys()
        assert all(np.array_equal(arrays[key], now[name][key]) for key in arrays), name


def test_skip_cache_check_believes_every_file_that_is_there(images):
    samples = samples_in(images)
    np.savez(samples[0].latents_file, nothing=np.zeros(1))
    cache = LatentsOnDisk("vae", trusted=True)
    assert [problem is None for problem in problems(cache, samples)] == [True, False, False, False]
    assert TextOnDisk(77, trusted=True).invalid_reason(samples[0]) is not None


def test_what_was_verified_is_remembered_and_not_read_again(images, tmp_path, monkeypatch):
    samples = samples_in(images)
    filled(samples)
    for file in images.rglob("*.npz"):
        os.utime(file, (time.time() - 60, time.time() - 60))
    known = FileIndex(tmp_path / "index")
    assert problems(LatentsOnDisk("vae", known), samples) == [None] * 4
    known.save()
    monkeypatch.setattr("library.data.cache.npz.verify", lambda path: pytest.fail(f"read {path}"))
    assert problems(LatentsOnDisk("vae", FileIndex(tmp_path / "index")), samples) == [None] * 4
    others = problems(LatentsOnDisk("other", FileIndex(tmp_path / "index")), samples)
    assert all(mentions(problem, "VAE", "dtype") for problem in others)


def test_a_mask_is_cached_with_the_latents_and_mirrored(images):
    file = next((images / "2_shapes").glob("*.png"))
    image = Image.open(file).convert("RGBA")
    image.putalpha(Image.linear_gradient("L").rotate(90).resize(image.size))
    image.save(file)
    samples = samples_in(images, "--alpha_mask", "--flip_aug")
    cache = filled(samples)
    (sample,) = (sample for sample in samples if sample.path == file)
    mask, mirrored = (cache.read(sample, flipped=flipped).mask for flipped in (False, True))
    assert (
        mask.shape == (sample.fit.bucket.height, sample.fit.bucket.width)
        and 0 <= mask.min() < 0.1 < 0.9 < mask.max() <= 1
    )
    assert torch.equal(mirrored, mask.flip(-1))


# ------------------------------------------------------------------------------------------------------------------ text


def test_fault_44_an_edited_caption_other_encoders_or_another_length_are_encoded_again(images):
    samples = samples_in(images)
    fill_text(samples, TextOnDisk(77, encoders="one"), stub_text)
    assert problems(TextOnDisk(77, encoders="one"), samples) == [None] * 4
    for cache, tokens in (
        (TextOnDisk(77, encoders="two"), ["text encoder", "dtype"]),
        (TextOnDisk(152, encoders="one"), ["hidden_state1", "77x8", "152x?"]),
        (TextOnDisk(77, (8, 999), encoders="one"), ["hidden_state2", "77x16", "77x999"]),
    ):
        assert all(mentions(problem, *tokens) for problem in problems(cache, samples))
    samples[0].path.with_suffix(".txt").write_text("edited")
    assert_only(problems(TextOnDisk(77, encoders="one"), samples_in(images)), 0, "caption")


def test_text_outputs_of_sd_scripts_are_made_again(images):
    (sample, *_) = samples_in(images)
    zeros = {
        "hidden_state1": np.zeros((77, 8), np.float32),
        "hidden_state2": np.zeros((77, 16), np.float32),
        "pool2": np.zeros(16, np.float32),
    }
    np.savez(sample.text_file, **zeros)
    assert TextOnDisk(77).invalid_reason(sample) is not None
    fill_text([sample], TextOnDisk(77), stub_text)
    assert TextOnDisk(77).read(sample, 0).pooled[0] == len(sample.caption)


# --------------------------------------------------------------------------------------------------------- whole machines

FILL = """
import sys, time
sys.path[:0] = [{root!r}, {tests!r}]
from pathlib import Path
from scanning import samples_of, scanned, stub_vae
from library.data.cache.latents import LatentsOnDisk
from library.data.cache.fill import fill_latents
def slow(images, noise):
    time.sleep(0.02)
    return stub_vae(images, noise)
samples = samples_of(scanned(Path(sys.argv[1])))
print("go", flush=True)
fill_latents(samples, LatentsOnDisk("vae"), slow, {batch})
"""


def start_filling(folder: Path, batch: int = 1) -> subprocess.Popen:
    code = FILL.format(root=str(ROOT), tests=str(Path(__file__).parent), batch=batch)
    return subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # fmt: skip


def litter(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if path.name.endswith(".tmp")]


@pytest.mark.parametrize(
    "after",
    [0.03, pytest.param(0.1, marks=pytest.mark.long), pytest.param(0.2, marks=pytest.mark.long)],
)
@pytest.mark.parametrize("batch", [1, pytest.param(4, marks=pytest.mark.long)])
def test_fault_3_kill_9_while_caching_then_rerun_equals_a_clean_run(after, batch, tmp_path):
    from tools.make_tiny_dataset import make_images

    make_images(tmp_path / "pics" / "1_x", 16)
    process = start_filling(tmp_path / "pics", batch)
    assert process.stdout.readline() == "go\n"
    time.sleep(after)
    process.kill()
    process.wait()
    done = len(list(tmp_path.rglob("*.npz")))
    samples = samples_in(tmp_path / "pics")
    cache = LatentsOnDisk("vae")
    fill_latents(samples, cache, stub_vae, batch)
    assert done < 16 and problems(cache, samples) == [None] * 16 and litter(tmp_path) == []
    resumed = contents(tmp_path)
    for file in tmp_path.rglob("*.npz"):
        file.unlink()
    fill_latents(samples, LatentsOnDisk("vae"), stub_vae, batch)
    clean = contents(tmp_path)
    assert resumed.keys() == clean.keys()
    for name, arrays in clean.items():
        for key in arrays:
            if batch == 1:
                assert np.array_equal(arrays[key], resumed[name][key]), (name, key)
            np.testing.assert_allclose(arrays[key], resumed[name][key], atol=1e-5)


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit on file sizes")
def test_fault_5_a_full_disk_stops_with_the_path_and_leaves_nothing_torn(images):
    code = f"import resource, signal; resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000)); signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n{FILL}"
    code = (
        code.replace("{root!r}", repr(str(ROOT)))
        .replace("{tests!r}", repr(str(Path(__file__).parent)))
        .replace("{batch}", "1")
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(images)], capture_output=True, text=True, check=False
    )
    assert done.returncode != 0 and mentions(done.stderr, "RunError", "_sdxl.npz", "File too large")
    assert not list(images.rglob("*.npz")) and litter(images) == []


def test_fault_54_two_processes_caching_one_folder_do_no_harm(tmp_path):
    from tools.make_tiny_dataset import make_images

    make_images(tmp_path / "1_x", 12)
    both = [start_filling(tmp_path) for _ in range(2)]
    for process in both:
        assert process.wait(60) == 0, process.stderr.read()
    samples = samples_in(tmp_path)
    assert problems(LatentsOnDisk("vae"), samples) == [None] * 12 and litter(tmp_path) == []


def test_fault_50_a_folder_that_cant_be_written_is_told_with_its_path(images):
    samples = samples_in(images)
    blocked = [replace(sample, cache_stem=str(sample.path / "below a file")) for sample in samples]
    never = lambda *_: pytest.fail("encoded before the folder was tried")
    with pytest.raises(RunError, match=mentioning("2_shapes", "--cache_dir", "writ|permission")):
        fill_latents(blocked, LatentsOnDisk("vae"), never, 1)


def test_latents_made_anew_are_kept_until_the_new_ones_are_whole(images):
    samples = samples_in(images)
    filled(samples)
    before = contents(images)

    def broken(images, noise):
        raise RunError("the GPU is gone")

    with pytest.raises(RunError, match="the GPU is gone"):
        fill_latents(samples, LatentsOnDisk("vae"), broken, 2, overwrite=True)
    after = contents(images)
    assert before.keys() == after.keys() and all(
        np.array_equal(before[n]["latents"], after[n]["latents"]) for n in before
    )
    seen = []
    fill_latents(
        samples,
        LatentsOnDisk("vae"),
        lambda *given: seen.append(1) or stub_vae(*given),
        1,
        overwrite=True,
    )
    assert len(seen) == 4


def test_a_hole_in_a_cache_stops_the_run_before_the_first_step(images):
    from library.training.setup.caches import finish_caches

    class OneProcess:
        is_main_process = False

        def wait_for_everyone(self) -> None: ...

    samples = samples_in(images)
    cache = filled(samples)
    finish_caches(samples, (cache, None), OneProcess(), FileIndex())
    samples[1].latents_file.unlink()
    with pytest.raises(RunError, match=mentioning("1", "picture1.png", "cache")):
        finish_caches(samples, (cache, None), OneProcess(), FileIndex())


# ------------------------------------------------------------------------------------------------- drawn captions, cached


def test_the_index_is_json_that_names_its_folder(images, tmp_path):
    known = FileIndex(tmp_path / "index")
    scanned(images, file_index=known)
    known.save()
    for file in (tmp_path / "index").glob("*.json"):
        assert json.loads(file.read_text())["folder"] == str(images / "2_shapes")


def test_text_plan_keeps_one_text_where_nothing_is_drawn_and_the_empty_one_where_captions_are_dropped(
    images,
):
    (sample, *_) = samples_in(images)
    assert CaptionVariants(5).texts(sample) == (sample.caption,)
    (dropped, *_) = samples_in(images, "--caption_dropout_rate", 0.5)
    assert CaptionVariants(5).texts(dropped) == (sample.caption, "")


def test_fault_26_damage_that_no_decoder_sees_is_seen_by_the_recorded_content(images, tmp_path):
    """A flipped bit in a JPEG decodes; the index holds the hash of what was audited, and the cache that of what it encodes."""
    file = images / "2_shapes" / "photo.jpg"
    Image.effect_noise((128, 128), 60).convert("RGB").save(file, quality=90)
    os.utime(file, (1_500_000_000, 1_500_000_000))
    known = FileIndex(tmp_path / "index")
    samples = samples_in(images)
    assert audit(samples, known) == []
    recorded = known.get(str(file.parent), file.name, file_stamp(file))
    assert recorded["decoded"] and len(recorded["content"]) == 32
    cache = filled(samples)
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 0x10
    file.write_bytes(raw)
    assert known.get(str(file.parent), file.name, file_stamp(file)) == {}
    (sample,) = (sample for sample in samples if sample.path == file)
    assert mentions(cache.invalid_reason(sample), "picture|image", "chang|differ")


def test_the_audit_decodes_each_image_once_in_its_life(images, tmp_path, monkeypatch):
    for file in images.rglob("*.png"):
        os.utime(file, (1_500_000_000, 1_500_000_000))
    known = FileIndex(tmp_path / "index")
    samples = samples_in(images)
    audit(samples, known)
    monkeypatch.setattr("library.images.decode", lambda *_, **__: pytest.fail("decoded again"))
    assert audit(samples, known) == []
