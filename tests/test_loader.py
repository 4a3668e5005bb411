"""The loader: what a batch holds, and that it doesn't depend on workers or how they start."""

import dataclasses
from itertools import islice

import pytest
import torch
from messages import mentioning, mentions
from scanning import samples_of, scanned, stub_text, stub_vae

from library.data.augment import load_pixels
from library.data.batch_sampler import BatchPosition, BatchSampler, MicroBatch
from library.data.cache.fill import fill_latents, fill_text
from library.data.cache.latents import LatentsInMemory, LatentsOnDisk
from library.data.cache.text import CaptionVariants, TextInMemory
from library.data.loader import Batches, group_samples, load_batches
from library.errors import RunError


def set_up(folder, *argv: object, latents=None, text=None):
    datasets = scanned(folder, *argv)
    samples = samples_of(datasets)
    if latents is not None:
        fill_latents(samples, latents, stub_vae, 2)
    if text is not None:
        fill_text(samples, text, stub_text)
    batches = Batches(samples, latents, text, seed=3, max_train_steps=100)
    return batches, BatchSampler(group_samples(datasets, samples), seed=3)


def loaded(batches, order, count=12, **settings):
    return list(
        islice(
            load_batches(
                batches, order.from_step(0, 0), pin_memory=False, **{"num_workers": 0, **settings}
            ),
            count,
        )
    )


def assert_same(one, two):
    assert one.position == two.position and one.paths == two.paths and one.captions == two.captions
    for name in (
        "images",
        "latents",
        "original_sizes",
        "crop_top_lefts",
        "target_sizes",
        "weights",
    ):
        a, b = getattr(one, name), getattr(two, name)
        assert (a is None and b is None) or torch.equal(a, b), name


RANDOM = [
    "--flip_aug",
    "--shuffle_caption",
    "--caption_tag_dropout_rate",
    0.3,
    "--caption_dropout_rate",
    0.2,
    "--train_batch_size",
    2,
]


@pytest.mark.parametrize(
    "method",
    [
        "fork",
        pytest.param("spawn", marks=pytest.mark.long),
        pytest.param("forkserver", marks=pytest.mark.long),
    ],
)
def test_workers_give_the_same_batches_bit_for_bit(images, method):
    batches, order = set_up(images, *RANDOM)
    alone = loaded(batches, order)
    for one, two in zip(
        alone, loaded(batches, order, num_workers=2, start_method=method), strict=True
    ):
        assert_same(one, two)
    assert len({caption for batch in alone for caption in batch.captions}) > 4


def test_spawned_workers_read_what_a_windows_user_reads(images):
    batches, order = set_up(images, "--train_batch_size", 2, latents=LatentsOnDisk())
    for one, two in zip(
        loaded(batches, order, 2),
        loaded(batches, order, 2, num_workers=1, start_method="spawn"),
        strict=True,
    ):
        assert_same(one, two)


def test_a_batch_holds_the_image_mirrored_or_not_with_its_sizes(images):
    batches, order = set_up(images, "--flip_aug")
    flips = set()
    for batch in loaded(batches, order, 16):
        sample = next(sample for sample in batches.samples if str(sample.path) == batch.paths[0])
        pixels = torch.from_numpy(load_pixels(sample).rgb.copy()).permute(2, 0, 1) / 127.5 - 1
        flipped = not torch.allclose(batch.images[0], pixels, atol=1e-6)
        if flipped:
            torch.testing.assert_close(batch.images[0], pixels.flip(-1), rtol=0, atol=1e-6)
        flips.add(flipped)
        assert batch.original_sizes.tolist() == [[sample.size.height, sample.size.width]]
        assert batch.target_sizes.tolist() == [[sample.fit.bucket.height, sample.fit.bucket.width]]
        assert batch.crop_top_lefts.tolist() == [list(sample.crop_top_left(flipped=flipped))]
        assert batch.weights.tolist() == [1.0]
    assert flips == {True, False}


@pytest.mark.parametrize("cache", [LatentsInMemory, LatentsOnDisk])
def test_cached_latents_are_mirrored_when_the_image_would_be(images, cache):
    fresh, order = set_up(images, "--flip_aug")
    cached, _ = set_up(images, "--flip_aug", latents=cache())
    for one, two in zip(loaded(fresh, order, 16), loaded(cached, order, 16), strict=True):
        expected = torch.nn.functional.avg_pool2d(one.images.mean(1, keepdim=True), 8).expand(
            -1, 4, -1, -1
        )
        assert (two.latents - expected).abs().max() < 0.1 and torch.equal(
            one.crop_top_lefts, two.crop_top_lefts
        )


def test_cached_text_comes_with_its_image(images):
    batches, order = set_up(images, latents=LatentsInMemory(), text=TextInMemory(CaptionVariants()))
    for batch in loaded(batches, order, 8):
        assert batch.text.pooled[0, 0] == len(batch.captions[0])


def test_every_epoch_draws_anew_and_repeats_show_a_image_as_often(images):
    batches, order = set_up(images, *RANDOM[:-2])
    first, second = loaded(batches, order, 16)[:8], loaded(batches, order, 16)[8:]
    assert sorted(batch.paths for batch in first) == sorted(batch.paths for batch in second)
    assert sorted(batch.captions for batch in first) != sorted(batch.captions for batch in second)
    assert all(sum(batch.paths == other.paths for other in first) == 2 for batch in first)


def test_skipped_steps_decode_nothing(images, monkeypatch):
    batches, order = set_up(images)
    whole = loaded(batches, order, 8)
    read = []
    monkeypatch.setattr(
        "library.data.loader.load_pixels",
        lambda sample, *draw, **how: read.append(sample) or load_pixels(sample, *draw, **how),
    )
    rest = list(
        islice(load_batches(batches, order.from_step(5, 0), num_workers=0, pin_memory=False), 3)
    )
    for one, two in zip(whole[5:], rest, strict=True):
        assert_same(one, two)
    assert len(read) == 3


def test_cached_variants_are_drawn_and_captions_dropped_as_often_as_asked(images):
    """--text_cache_variants: of each image's drawn captions one per sample, the empty one by the dropout rate."""
    words = [
        "--shuffle_caption",
        "--caption_dropout_rate",
        0.25,
        "--caption_dropout_every_n_epochs",
        4,
    ]
    variants = CaptionVariants(3)
    batches, order = set_up(images, *words, latents=LatentsInMemory(), text=TextInMemory(variants))
    per_epoch = len(order.epoch(0))
    seen = loaded(batches, order, 100 * per_epoch)
    for sample in batches.samples:
        texts = variants.texts(sample)
        own = [
            batch.captions[0]
            for batch in seen
            if batch.paths == (sample.file,) and batch.position.epoch % 4 != 3
        ]
        assert len(texts) == 4 and set(own) == set(texts) and texts[-1] == ""
        assert abs(own.count("") / len(own) - 0.25) < 4 * (0.25 * 0.75 / len(own)) ** 0.5
    assert {batch.captions for batch in seen if batch.position.epoch % 4 == 3} == {("",)}
    assert all(batch.text.pooled[0, 0] == len(batch.captions[0]) for batch in seen)


def test_text_kept_in_memory_stays_in_this_process_while_workers_decode(images):
    batches, order = set_up(images, "--flip_aug", text=TextInMemory(CaptionVariants()))
    for one, two in zip(loaded(batches, order, 8), loaded(batches, order, 8, num_workers=2, start_method="fork"), strict=True):  # fmt: skip
        assert_same(one, two)
        assert torch.equal(one.text.pooled, two.text.pooled)


def test_augmented_images_are_the_same_from_workers(images):
    batches, order = set_up(
        images, "--flip_aug", "--color_aug", "--random_crop", "--train_batch_size", 2
    )
    alone = loaded(batches, order)
    for one, two in zip(
        alone, loaded(batches, order, num_workers=4, start_method="fork"), strict=True
    ):
        assert_same(one, two)
    again = [batch for batch in alone if batch.paths == alone[0].paths]
    assert len({batch.images.numpy().tobytes() for batch in again}) == len(again)


def test_regularisation_samples_have_their_weight_and_masks_their_shape(images, tmp_path):
    from tools.make_tiny_dataset import make_images

    make_images(tmp_path / "reg" / "1_thing", 2, seed=9)
    datasets = scanned(images, "--reg_data_dir", tmp_path / "reg", "--alpha_mask")
    samples = samples_of(datasets)
    batches = Batches(samples, None, None, seed=3, max_train_steps=10, prior_loss_weight=0.5)
    for batch in loaded(batches, BatchSampler(group_samples(datasets, samples), seed=3)):
        is_reg = "1_thing" in batch.paths[0]
        assert batch.weights.tolist() == [0.5 if is_reg else 1.0]
        assert batch.masks.shape == (1, *batch.images.shape[2:]) and batch.masks.min() == 1.0


def test_conditioning_images_come_with_their_images(images, tmp_path):
    import shutil

    shutil.copytree(images / "2_shapes", tmp_path / "masks")
    (tmp_path / "d.toml").write_text(
        f"[[datasets]]\nresolution = 128\nenable_bucket = true\nbucket_reso_steps = 32\nmin_bucket_reso = 64\nmax_bucket_reso = 256\nflip_aug = true\n"
        f"[[datasets.subsets]]\nimage_dir = '{images / '2_shapes'}'\nconditioning_data_dir = '{tmp_path / 'masks'}'\n"
    )
    from library.data.dataset_config import read_datasets
    from library.data.options import DATA_OPTIONS
    from library.data.scan import scan
    from library.options import read_options
    from library.training.options.objective import LossOptions

    words = ["--dataset_config", str(tmp_path / "d.toml"), "--masked_loss"]
    options = read_options("", [*DATA_OPTIONS, LossOptions], words)
    datasets = scan(read_datasets(options)[0])
    samples = samples_of(datasets)
    batches = Batches(samples, None, None, seed=3, max_train_steps=10)
    for batch in loaded(batches, BatchSampler(group_samples(datasets, samples), seed=3), 8):
        assert torch.equal(batch.conditioning, batch.images)  # here they are the images themselves
    without = [
        dataclasses.replace(sample, conditioning=None) if i % 2 else sample
        for i, sample in enumerate(samples)
    ]
    mixed = Batches(without, None, None, seed=3, max_train_steps=10)
    for i, sample in enumerate(without):
        batch = mixed[MicroBatch(BatchPosition(0, 0, 0, 0, 2, True, False), (i, i))]
        assert (batch.conditioning is None) == (sample.conditioning is None)
    whites = Batches(
        [without[0], dataclasses.replace(without[0], conditioning=None)],
        None,
        None,
        seed=3,
        max_train_steps=1,
    )
    batch = whites[MicroBatch(BatchPosition(0, 0, 0, 0, 2, True, False), (0, 1))]
    assert (batch.conditioning[1] == 1.0).all() and not (batch.conditioning[0] == 1.0).all()


def test_each_image_for_inpainting_has_its_own_mask_or_a_drawn_one_whatever_its_batch(
    images, tmp_path
):
    import shutil

    shutil.copytree(images / "2_shapes", tmp_path / "masks")
    masked = samples_of(scanned(images, "--conditioning_data_dir", tmp_path / "masks"))[0]
    alone = dataclasses.replace(masked, conditioning=None)
    assert masked.has_mask and not alone.has_mask
    cache = LatentsInMemory(for_inpainting=True)
    fill_latents([masked], cache, stub_vae, 2)
    batches = Batches(
        [masked, alone],
        cache,
        None,
        seed=3,
        max_train_steps=1,
        for_inpainting=True,
        reads_conditioning=False,
    )
    fixed, drawn, mixed = (
        batches[MicroBatch(BatchPosition(0, 0, 0, first, 2, True, False), numbers)]
        for first, numbers in ((0, (0,)), (1, (1,)), (0, (0, 1)))
    )
    assert (
        fixed.images is None
        and fixed.conditioning is None
        and fixed.cached_inpaint_channels.shape[:2] == (1, 5)
    )
    assert drawn.cached_inpaint_channels is None and torch.equal(
        drawn.inpaint_masks[0], mixed.inpaint_masks[1]
    )
    assert (
        torch.equal(mixed.inpaint_masks[0], mixed.conditioning[0, 0] / 2 + 0.5)
        and mixed.images.shape[0] == 2
    )


@pytest.mark.parametrize("workers", [0, 1])
def test_a_image_that_vanishes_during_the_run_is_one_sentence(workers, images):
    batches, order = set_up(images)
    for sample in batches.samples:
        sample.path.unlink()
    with pytest.raises(RunError) as error:
        loaded(batches, order, 1, num_workers=workers, start_method="fork" if workers else None)
    assert any(
        mentions(str(error.value), sample.path.name, "No such file") for sample in batches.samples
    )
    assert "\n" not in str(error.value)


def test_a_cache_that_is_damaged_during_the_run_is_one_sentence(images):
    batches, order = set_up(images, latents=LatentsOnDisk())
    for sample in batches.samples:
        sample.latents_file.write_bytes(b"")
    with pytest.raises(RunError, match=mentioning("_sdxl.npz", "cache", "File is not a zip file")):
        loaded(batches, order, 1)
