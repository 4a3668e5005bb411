"""Noise and loss: golden 05, the papers' formulas, and draws by place."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from tolerance import (
    FORMULA,
    ZERO_SNR_ALPHA_BAR,
    ZERO_SNR_BETAS,
    ZERO_SNR_LATENTS,
    assert_embedding,
    assert_formula,
)

from library.models.noise_schedule import NoiseSchedule
from library.models.size_conditioning import size_vector
from library.models.unet_blocks import sinusoidal_embedding
from library.rng import SampleRng
from library.safetensors_io import load_tensors
from library.training.objective import loss as losses
from library.training.objective import noise as noises
from library.training.options.objective import LossOptions, NoiseOptions

pytestmark = pytest.mark.numeric

GOLDEN = Path(__file__).parent / "golden"
T, _ = load_tensors(GOLDEN / "05_loss.safetensors")
NOISE_CASES = json.loads((GOLDEN / "05_loss.json").read_text())["noisefn"]
SCHEDULE, ZERO = NoiseSchedule.sdxl(), NoiseSchedule.sdxl(zero_terminal_snr=True)


def close(found, name, **tolerance):
    torch.testing.assert_close(found, T[name], **(tolerance or FORMULA))


def test_golden_05_schedule():
    for table, name in (
        (SCHEDULE.betas, "betas"),
        (SCHEDULE.alpha_bar, "alphas_cumprod"),
        (SCHEDULE.snr, "all_snr"),
    ):
        close(
            table, name, rtol=1e-6, atol=0
        )  # closer than the rule: our tables are the same everywhere
    close(ZERO.betas, "zsnr_betas", **ZERO_SNR_BETAS)
    close(ZERO.alpha_bar, "zsnr_alphas_cumprod", **ZERO_SNR_ALPHA_BAR)


def test_zero_terminal_snr_ends_in_pure_noise_and_its_snr_is_of_the_changed_schedule():
    """Differs from sd-scripts, whose table is of the unchanged one (docs/differences.md)."""
    assert ZERO.alpha_bar[-1] == 0 and ZERO.snr[-1] == 0
    assert ZERO.alpha_bar[0] == pytest.approx(SCHEDULE.alpha_bar[0].item())
    assert torch.equal(T["all_snr"], T["all_snr_when_zero_terminal_snr_is_set"])
    torch.testing.assert_close(ZERO.snr, ZERO.alpha_bar / (1 - ZERO.alpha_bar))


@pytest.mark.parametrize(
    "prefix, schedule, tolerance", [("", SCHEDULE, FORMULA), ("zsnr_", ZERO, ZERO_SNR_LATENTS)]
)
def test_golden_05_noisy_and_velocity(prefix, schedule, tolerance):
    alpha_bar = schedule.at(T["timesteps"])
    close(noises.add_noise(T["latents"], T["noise"], alpha_bar), f"{prefix}noisy", **tolerance)
    close(noises.velocity(T["latents"], T["noise"], alpha_bar), f"{prefix}velocity", **tolerance)


@pytest.mark.parametrize("kind", ["l2", "l1"])
def test_golden_05_plain_losses(kind):
    found = losses.element_loss(T["pred"], T["target"], kind, None)
    close(found, f"loss.{kind}.none")
    close(found.mean(), f"loss.{kind}.mean")


@pytest.mark.parametrize("kind", ["huber", "smooth_l1"])
@pytest.mark.parametrize("schedule", ["constant", "exponential", "snr"])
@pytest.mark.parametrize("c, scale", [(0.1, 1.0), (0.25, 0.7)])
def test_golden_05_huber_losses(kind, schedule, c, scale):
    name = f"loss.{kind}.{schedule}.c{c}.s{scale}"
    threshold = losses.huber_threshold(T["timesteps"], SCHEDULE, schedule, c=c, scale=scale)
    close(threshold, f"{name}.threshold")
    found = losses.element_loss(T["pred"], T["target"], kind, threshold)
    close(found, f"{name}.none")
    close(found.mean(), f"{name}.mean")


def test_golden_05_weights():
    snr, per_sample = SCHEDULE.snr[T["timesteps"]], T["per_sample_l2"]
    for gamma in (1, 5, 20):
        close(
            per_sample * losses.min_snr_weight(snr, gamma, v_prediction=False),
            f"min_snr.gamma{gamma}.eps",
        )
        close(
            per_sample * losses.min_snr_weight(snr, gamma, v_prediction=True),
            f"min_snr.gamma{gamma}.v",
        )
    close(per_sample * losses.debiased_weight(snr, v_prediction=False), "debiased.eps")
    close(per_sample * losses.debiased_weight(snr, v_prediction=True), "debiased.v")
    close(per_sample * losses.noise_like_weight(snr), "scale_v_pred_like_noise_pred")
    for strength in (0.1, 1.0):
        close(per_sample * losses.v_like_weight(snr, strength), f"v_pred_like_loss.{strength}")


@pytest.mark.parametrize(
    "v_prediction, expected", [(False, [1.0, 1.0, 0.25]), (True, [1 / 2, 5 / 6, 5 / 21])]
)
def test_min_snr_weight_caps_the_snr_at_gamma(v_prediction, expected):
    """By hand for gamma 5, at SNRs under, at and over the cap."""
    weight = losses.min_snr_weight(
        torch.tensor([1.0, 5.0, 20.0]), gamma=5.0, v_prediction=v_prediction
    )
    torch.testing.assert_close(weight, torch.tensor(expected))


@pytest.mark.parametrize("timestep", [0, 999])
@pytest.mark.parametrize("schedule", [SCHEDULE, ZERO])
def test_velocity_weights_are_finite_at_both_ends(timestep, schedule):
    snr = schedule.snr[[timestep]]
    weights = [
        losses.min_snr_weight(snr, 5, v_prediction=True),
        losses.debiased_weight(snr, v_prediction=True),
        losses.noise_like_weight(snr),
    ]
    assert torch.cat(weights).isfinite().all()


def test_the_options_choose_and_multiply_the_weights():
    def weighted(**options):
        return losses.sample_losses(
            T["pred"],
            T["target"],
            T["timesteps"],
            SCHEDULE,
            LossOptions(**options),
            v_prediction=False,
        )

    plain = weighted()
    torch.testing.assert_close(plain, ((T["pred"] - T["target"]) ** 2).mean((1, 2, 3)))
    snr = SCHEDULE.snr[T["timesteps"]]
    both = weighted(min_snr_gamma=5.0, debiased_estimation_loss=True)
    expected = (
        plain
        * losses.min_snr_weight(snr, 5, v_prediction=False)
        * losses.debiased_weight(snr, v_prediction=False)
    )
    torch.testing.assert_close(both, expected)
    assert torch.equal(weighted(min_snr_gamma=0.0), plain)


# ---------------------------------------------------------------------------------------------------------------- noise


class Recorded(SampleRng):
    """Gives the raw draws of a golden case by purpose."""

    def __new__(cls, *args):
        return object.__new__(cls)

    def __init__(self, given: dict):
        super().__init__(0, 0, 0, 2)
        object.__setattr__(self, "given", given)

    def normal(self, purpose, shape):
        return self.given[purpose]

    def uniform(self, purpose, shape=()):
        return self.given[purpose].view(-1, *[1] * len(shape)).expand(2, *shape)

    def integers(self, purpose, low, high):
        assert (self.given[purpose] >= low).all() and (self.given[purpose] < high).all()
        return self.given[purpose]


def draws_of(case: dict) -> dict:
    names = {"randn_like": "noise", "randint": "timestep"}
    given: dict = {}
    for i, (kind, _) in enumerate(case["torch_draws"]):
        tensor = T[f"noisefn.{case['index']}.draw{i}.{kind}"]
        purpose = names.get(kind)
        if kind == "randn_like" and "noise" in given:
            purpose = "ip noise"
        elif kind == "rand":
            purpose = (
                "offset strength" if case["options"].get("noise_offset") else "ip noise strength"
            )
        elif kind == "randn":
            purpose = (
                f"level {sum(name.startswith('level') for name in given)}"
                if "multires_noise_iterations" in case["options"]
                else "offset"
            )
        given[purpose] = tensor
    return given


@pytest.mark.parametrize("case", NOISE_CASES, ids=lambda case: str(case["options"]))
def test_golden_05_noise_functions(case):
    """The reference draws a pyramid's sizes and its deviation for the batch; fed with its draws, the formulas agree."""
    latents, given, i = T["noisefn.latents"], draws_of(case), case["index"]
    options = NoiseOptions(**case["options"])
    if options.multires_noise_iterations:
        sizes = noises.pyramid_sizes(
            12, 16, options.multires_noise_iterations, case["python_random_draws"]
        )
        levels = [given[f"level {k}"] for k in range(len(sizes))]
        assert [tuple(level.shape[2:]) for level in levels] == sizes
        noise = noises.pyramid_noise(given["noise"], levels, options.multires_noise_discount)
        close(noise, f"noisefn.{i}.noise")
        return
    noisy = noises.add_training_noise(latents, Recorded(given), SCHEDULE, options)
    close(noisy.noise, f"noisefn.{i}.noise")
    close(noisy.latents, f"noisefn.{i}.noisy")
    assert torch.equal(noisy.timesteps, T[f"noisefn.{i}.timesteps"])


def test_the_random_numbers_of_a_sample_depend_only_on_its_position():
    """Not on the micro-batch that it is in: four samples together draw what they draw in two halves."""
    options = NoiseOptions(
        noise_offset=0.1,
        multires_noise_iterations=4,
        ip_noise_gamma=0.1,
        ip_noise_gamma_random_strength=True,
    )
    latents = torch.randn(4, 4, 8, 12, generator=torch.Generator().manual_seed(0))
    whole = noises.add_training_noise(latents, SampleRng(7, 2, 10, 4), SCHEDULE, options)
    halves = [
        noises.add_training_noise(latents[k : k + 2], SampleRng(7, 2, 10 + k, 2), SCHEDULE, options)
        for k in (0, 2)
    ]
    for one, *two in zip(whole, *halves, strict=True):
        assert_formula(one, torch.cat(two))
    other = noises.add_training_noise(latents, SampleRng(7, 3, 10, 4), SCHEDULE, options)
    assert not torch.equal(whole.noise, other.noise)


def test_random_numbers_have_the_distributions_they_claim():
    rng = SampleRng(1, 0, 0, 4000)
    normal, uniform, whole = rng.normal("n", (4,)), rng.uniform("u"), rng.integers("i", 200, 600)
    assert abs(normal.mean()) < 0.05 and abs(normal.std() - 1) < 0.03
    assert uniform.min() >= 0 and uniform.max() < 1 and abs(uniform.mean() - 0.5) < 0.03
    assert whole.min() >= 200 and whole.max() < 600 and abs(whole.float().mean() - 399.5) < 10


def test_an_empty_range_of_timesteps_gives_its_upper_end():
    for low in (500, 600):
        options = object.__new__(
            NoiseOptions
        )  # the command line refuses it; the reference's configs may hold it
        for field in dataclasses.fields(NoiseOptions):
            object.__setattr__(options, field.name, field.default)
        object.__setattr__(options, "min_timestep", low)
        object.__setattr__(options, "max_timestep", 500)
        assert noises.sample_timesteps(SampleRng(0, 0, 0, 3), options).tolist() == [500] * 3


def test_timestep_fractions_follow_the_formulas_of_the_paper():
    """Esser et al. 2024, equations 19 to 21, at points computed by hand."""
    torch.testing.assert_close(
        noises.logit_normal(torch.tensor([0.0, 1.0]), mean=0.0, std=1.0),
        torch.tensor([0.5, 0.7310586]),
    )
    assert noises.logit_normal(torch.tensor(0.0), mean=1.0, std=2.0) == pytest.approx(0.7310586)
    ends = torch.tensor([0.0, 0.5, 1.0])
    torch.testing.assert_close(noises.mode(ends, 0.0), torch.tensor([1.0, 0.5, 0.0]))
    torch.testing.assert_close(noises.mode(ends, 1.29), torch.tensor([1.0, 0.5, 0.0]))
    assert noises.mode(torch.tensor(0.25), 1.0) == pytest.approx(
        0.75 - (math.cos(math.pi / 8) ** 2 - 0.75)
    )
    torch.testing.assert_close(noises.cosmap(torch.tensor([0.0, 0.5])), torch.tensor([0.0, 0.5]))


@pytest.mark.parametrize(
    "settings, middle",
    [
        (
            {"timestep_sampling": "logit_normal"},
            0.728,
        ),  # sigmoid(+-1.0986): erf of the normal's 1.0986
        ({"timestep_sampling": "mode", "mode_scale": 0.0}, 0.5),
        (
            {"timestep_sampling": "cosmap"},
            0.59,
        ),  # 2/pi (atan(1/2) - atan(-1/2)) of its density's integral
        ({"timestep_sampling": "uniform"}, 0.5),
    ],
)
def test_sampled_timesteps_are_in_the_middle_as_often_as_their_distribution_says(settings, middle):
    options = NoiseOptions(min_timestep=200, max_timestep=600, **settings)
    drawn = noises.sample_timesteps(SampleRng(3, 0, 0, 4000), options)
    assert drawn.min() >= 200 and drawn.max() < 600 and drawn.dtype == torch.int64
    found = ((drawn >= 300) & (drawn < 500)).float().mean().item()
    assert found == pytest.approx(middle, abs=0.03)


def test_the_papers_formulas_hold_at_the_first_and_the_last_timestep():
    """alpha_bar_0 = 1 - beta_0; at T the image is almost gone, and completely with zero terminal SNR."""
    first, last = torch.tensor([0]), torch.tensor([999])
    x, e = torch.full((1, 4, 2, 2), 2.0), torch.full((1, 4, 2, 2), 3.0)
    assert SCHEDULE.at(first).item() == pytest.approx(1 - 0.00085, rel=1e-6)
    betas = [(0.00085**0.5 + i / 999 * (0.012**0.5 - 0.00085**0.5)) ** 2 for i in range(1000)]
    assert SCHEDULE.at(last).item() == pytest.approx(
        math.prod(1 - beta for beta in betas), rel=1e-4
    )
    noisy = noises.add_noise(x, e, SCHEDULE.at(first))
    torch.testing.assert_close(
        noisy, torch.full_like(x, 2 * (1 - 0.00085) ** 0.5 + 3 * 0.00085**0.5)
    )
    # Lin et al. 2023, section 3.1: at T there is only noise to see, and the velocity is the negated image.
    assert torch.equal(noises.add_noise(x, e, ZERO.at(last)), e)
    assert torch.equal(noises.velocity(x, e, ZERO.at(last)), -x)


@pytest.mark.parametrize("timestep", [0, 999])
def test_the_weights_hold_at_the_first_and_the_last_timestep(timestep):
    """Hang et al. 2023 and Yu et al. 2024, from the SNR computed in double precision."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alpha_bar = torch.cumprod(1 - betas, 0)[timestep].item()
    exact = alpha_bar / (1 - alpha_bar)  # 1175 and 0.0047
    snr = SCHEDULE.snr[timestep : timestep + 1]
    capped = min(exact, 1000.0)
    for found, expected in (
        (losses.min_snr_weight(snr, 5.0, v_prediction=False), min(exact, 5) / exact),
        (losses.min_snr_weight(snr, 5.0, v_prediction=True), min(exact, 5) / (exact + 1)),
        (losses.debiased_weight(snr, v_prediction=False), capped**-0.5),
        (losses.debiased_weight(snr, v_prediction=True), 1 / (capped + 1)),
        (losses.noise_like_weight(snr), capped / (capped + 1)),
        (losses.v_like_weight(snr, 0.5), 1 + 0.5 * (capped + 1) / capped),
    ):
        assert found.item() == pytest.approx(expected, rel=1e-3)
    t = torch.tensor([timestep])
    sigma = ((1 - alpha_bar) / alpha_bar) ** 0.5
    threshold = losses.huber_threshold(t, SCHEDULE, "snr", c=0.1, scale=1.0).item()
    assert threshold == pytest.approx(0.9 / (1 + sigma) ** 2 + 0.1, rel=1e-4)
    falling = losses.huber_threshold(t, SCHEDULE, "exponential", c=0.1, scale=1.0).item()
    assert falling == pytest.approx(0.1 ** (timestep / 1000), rel=1e-4)


def test_golden_03_size_and_timestep_embeddings():
    text, _ = load_tensors(GOLDEN / "03_text.safetensors")
    found = size_vector(
        text["timeids.original_hw"], text["timeids.crop_top_left"], text["timeids.target_hw"]
    )
    sizes = torch.cat(
        [text[f"timeids.{name}"] for name in ("original_hw", "crop_top_left", "target_hw")], dim=1
    )
    assert_embedding(
        found.unflatten(1, (6, 256)), text["timeids.embedding"].unflatten(1, (6, 256)), sizes
    )
    timesteps = text["timestep_embedding.t"]
    assert_embedding(
        sinusoidal_embedding(timesteps, 320), text["timestep_embedding.dim320"], timesteps
    )
    assert sinusoidal_embedding(torch.tensor([1.0]), 4)[0].tolist() == pytest.approx(
        [math.cos(1), math.cos(0.01), math.sin(1), math.sin(0.01)]
    )


def test_golden_05_masks():
    """A conditioning image's red channel, or an alpha channel, weighs the loss without being evened out by its mean."""
    elements = losses.element_loss(T["pred"], T["target"], "l2", None)
    red = T["mask.conditioning_image"][:, 0] / 2 + 0.5
    for mask, name in ((red, "from_conditioning"), (T["mask.alpha"], "from_alpha")):
        close(elements * losses.latent_mask(mask, (8, 10)), f"mask.{name}")
