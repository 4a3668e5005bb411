"""Samplers: with a model that predicts the noise of one known image exactly, each of them must generate it."""

import pytest
import torch

from library.generation.denoise import Conditioning, Guidance, InpaintBlend, denoise
from library.generation.pipeline import noise_init_latents
from library.generation.samplers import SAMPLERS, make_sampler, set_steps
from library.models.noise_schedule import NoiseSchedule

pytestmark = pytest.mark.numeric

# These stop at the noise level of the first timestep instead of at none.
LEAVE_NOISE = {"pndm", "dpmsolver"}
# Samplers with more timesteps than steps.
MULTI_CALL = [name for name in SAMPLERS if name.split("_karras")[0] in ("pndm", "heun", "dpm_2", "dpm_2_a", "k_dpm_2", "k_dpm_2_a")]  # fmt: skip
CONDITIONING = [Conditioning(torch.zeros(2, 1, 1), torch.zeros(2, 1))]


def exact_model(image, *, v_prediction, zero_terminal_snr):
    """Predicts noise or velocity of the image exactly, between timesteps too."""
    alpha_bar = NoiseSchedule.sdxl(zero_terminal_snr=zero_terminal_snr).alpha_bar.clamp(
        min=2.0**-24
    )
    log_sigmas = ((1 - alpha_bar) / alpha_bar).sqrt().log()

    def predict(x, timesteps, context, vector, control, shrink):
        below = timesteps[0].floor().long()
        share = timesteps[0] - below
        sigma = torch.lerp(
            log_sigmas[below], log_sigmas[(below + 1).clamp(max=999)], share.float()
        ).exp()
        alpha = 1 / (sigma**2 + 1)
        noise = (x - alpha.sqrt() * image) / (1 - alpha).sqrt()
        return alpha.sqrt() * noise - (1 - alpha).sqrt() * image if v_prediction else noise

    return predict


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "v_prediction, zero_terminal_snr",
    [
        pytest.param(False, False),
        pytest.param(True, False, marks=pytest.mark.long),
        pytest.param(True, True, marks=pytest.mark.long),
    ],
)
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_generates_the_image_of_an_exact_model(name, v_prediction, zero_terminal_snr):
    torch.manual_seed(0)
    image = torch.randn(2, 4, 8, 8)
    sampler = make_sampler(name, v_prediction=v_prediction, zero_terminal_snr=zero_terminal_snr)
    sampler.set_timesteps(20)
    model = exact_model(image, v_prediction=v_prediction, zero_terminal_snr=zero_terminal_snr)
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    start = torch.randn(2, 4, 8, 8) * sampler.init_noise_sigma
    found = denoise(
        model,
        sampler,
        start,
        CONDITIONING,
        Guidance(1.0),
        timesteps=sampler.timesteps,
        generators=generators,
    )
    torch.testing.assert_close(found, image, rtol=0, atol=0.2 if name in LEAVE_NOISE else 2e-5)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_pndm_works_with_fewer_steps_than_runge_kutta_needs(steps):
    sampler = make_sampler("pndm", v_prediction=False, zero_terminal_snr=False)
    set_steps(sampler, steps)
    x = torch.randn(1, 4, 8, 8)
    for t in sampler.timesteps:
        x = sampler.step(torch.randn(1, 4, 8, 8), t, x, return_dict=False)[0]
    assert x.isfinite().all()


def denoise_init_image(name, strength, mask=None):
    """Denoises an init image with its exact model in 10 steps. Returns the latents, image, noise, and each prediction."""
    torch.manual_seed(0)
    image, noise, predictions = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), []
    sampler = make_sampler(name, v_prediction=False, zero_terminal_snr=False, from_init_image=True)
    sampler.set_timesteps(10)
    latents, timesteps = noise_init_latents(sampler, image, noise, 10, strength)
    exact = exact_model(image, v_prediction=False, zero_terminal_snr=False)

    def model(*inputs):
        predictions.append(exact(*inputs))
        return predictions[-1]

    blend = None if mask is None else InpaintBlend(image, noise, mask)
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    found = denoise(
        model,
        sampler,
        latents,
        CONDITIONING,
        Guidance(1.0),
        timesteps=timesteps,
        generators=generators,
        blend=blend,
    )
    return found, image, noise, predictions


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("strength", [1.0, 0.8, 0.3])
@pytest.mark.parametrize(
    "name",
    [
        name if name in MULTI_CALL else pytest.param(name, marks=pytest.mark.long)
        for name in SAMPLERS
    ],
)
def test_every_sampler_restores_an_init_image_at_every_strength(name, strength):
    """The first prediction is the noise of its timestep; with one timestep per step, as in the reference, that of the step before."""
    found, image, noise, predictions = denoise_init_image(name, strength)
    if "lms" not in name:  # Diffusers' lms uses coefficients of steps that weren't run
        torch.testing.assert_close(found, image, rtol=0, atol=0.2 if name in LEAVE_NOISE else 5e-5)
    steps = int(10 * strength)
    if name in MULTI_CALL:
        assert len(predictions) == (steps + 1 if name == "pndm" else 2 * steps - 1)
    else:
        assert len(predictions) == (steps if name == "dpmsingle" else min(steps, 9))
    if name in MULTI_CALL or name == "dpmsingle":
        assert float(predictions[0].std() / noise.std()) == pytest.approx(1, rel=0.02)
    else:
        assert noise.std() < predictions[0].std() < 3 * noise.std()


@pytest.mark.parametrize("name", MULTI_CALL)
def test_kept_latents_have_the_noise_of_each_timestep_within_steps_too(name):
    """The complete image is kept, so each prediction is the noise of its timestep."""
    found, image, noise, predictions = denoise_init_image(name, 0.8, torch.zeros(2, 1, 8, 8))
    assert torch.equal(found, image)
    if "dpm_2_a" not in name:  # it adds noise between its two calls
        assert max(float((prediction - noise).abs().max()) for prediction in predictions) < 0.1


def test_lcm_works_with_more_than_the_50_steps_of_its_training():
    """Up to 50 steps use its own timesteps; more begin at the last timestep too and are evenly spaced."""
    sampler = make_sampler("lcm", v_prediction=False, zero_terminal_snr=False)
    set_steps(sampler, 4)
    assert sampler.timesteps.tolist() == [999, 759, 499, 259]
    set_steps(sampler, 80)
    assert (
        sampler.timesteps[:5].tolist() == [999, 987, 974, 962, 949] and sampler.timesteps[-1] == 12
    )
    image = torch.randn(2, 4, 8, 8)
    model = exact_model(image, v_prediction=False, zero_terminal_snr=False)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 4, 8, 8)
    found = denoise(
        model,
        sampler,
        noise,
        CONDITIONING,
        Guidance(1.0),
        timesteps=sampler.timesteps,
        generators=generator,
    )
    torch.testing.assert_close(found, image, rtol=0, atol=1e-3)


def test_a_step_counts_once_however_often_it_calls_the_model():
    """Control nets are active for a share of the steps, and the progress bar counts them."""
    sampler = make_sampler("heun", v_prediction=False, zero_terminal_snr=False)
    sampler.set_timesteps(3)
    calls, steps = [], []
    denoise(
        exact_model(torch.zeros(2, 4, 8, 8), v_prediction=False, zero_terminal_snr=False),
        sampler,
        torch.randn(2, 4, 8, 8),
        CONDITIONING,
        Guidance(1.0),
        timesteps=sampler.timesteps,
        control_at=lambda step, count: calls.append((step, count)),
        on_step=lambda: steps.append(1),
    )
    assert calls == [(0, 3), (0, 3), (1, 3), (1, 3), (2, 3)] and len(steps) == 3


def test_guidance_by_hand():
    negative, empty, prompt = (torch.full((1, 1, 1, 2), value) for value in (1.0, 2.0, 4.0))
    both = torch.cat([negative, prompt])
    assert torch.equal(Guidance(3.0).combine(both), torch.full((1, 1, 1, 2), 1.0 + 3 * 3))
    three = torch.cat([negative, empty, prompt])
    assert torch.equal(
        Guidance(3.0, 0.5).combine(three), torch.full((1, 1, 1, 2), 2.0 + 3 * 2 - 0.5 * -1)
    )
    assert torch.equal(Guidance(1.0).combine(prompt), prompt)
    spread = torch.cat(
        [torch.tensor([[[[0.0, 1.0]]]]), torch.tensor([[[[0.0, 2.0]]]])]
    )  # guided: 0 and 1 + 3 * (2 - 1) = 4
    assert torch.allclose(
        Guidance(3.0, rescale=1.0).combine(spread), torch.tensor([[[[0.0, 2.0]]]])
    )
    assert torch.allclose(
        Guidance(3.0, rescale=0.5).combine(spread), torch.tensor([[[[0.0, 3.0]]]])
    )
