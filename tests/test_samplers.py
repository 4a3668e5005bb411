"""Samplers: with a model that knows the one picture there is, each of them must draw it."""

import pytest
import torch

from library.generation.denoise import Conditioning, Guidance, InpaintBlend, denoise
from library.generation.pipeline import _noised
from library.generation.sampler_options import SAMPLERS
from library.generation.samplers import make_sampler, set_steps
from library.models.noise_schedule import NoiseSchedule

pytestmark = pytest.mark.numeric

# These stop at the noise of the first timestep instead of at none.
LEAVE_NOISE = {"pndm", "dpmsolver"}
# Those of more timesteps than steps.
ASK_AGAIN = [name for name in SAMPLERS if name.split("_karras")[0] in ("pndm", "heun", "dpm_2", "dpm_2_a", "k_dpm_2", "k_dpm_2_a")]  # fmt: skip
TOLD = [Conditioning(torch.zeros(2, 1, 1), torch.zeros(2, 1))]


def model_that_knows(image, *, v_prediction, zero_terminal_snr):
    """Predicts noise or velocity of the picture exactly, between timesteps too."""
    alpha_bar = NoiseSchedule.sdxl(zero_terminal_snr=zero_terminal_snr).alpha_bar.clamp(min=2.0**-24)
    log_sigmas = ((1 - alpha_bar) / alpha_bar).sqrt().log()

    def predict(x, timesteps, context, vector, extra, shrink):
        below = timesteps[0].floor().long()
        share = timesteps[0] - below
        sigma = torch.lerp(log_sigmas[below], log_sigmas[(below + 1).clamp(max=999)], share.float()).exp()
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
def test_every_sampler_draws_the_only_image_that_the_model_knows(name, v_prediction, zero_terminal_snr):
    torch.manual_seed(0)
    image = torch.randn(2, 4, 8, 8)
    sampler = make_sampler(name, v_prediction=v_prediction, zero_terminal_snr=zero_terminal_snr)
    sampler.set_timesteps(20)
    model = model_that_knows(image, v_prediction=v_prediction, zero_terminal_snr=zero_terminal_snr)
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    start = torch.randn(2, 4, 8, 8) * sampler.init_noise_sigma
    drawn = denoise(model, sampler, start, TOLD, Guidance(1.0), timesteps=sampler.timesteps, generators=generators)
    torch.testing.assert_close(drawn, image, rtol=0, atol=0.2 if name in LEAVE_NOISE else 2e-5)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_pndm_draws_in_fewer_steps_than_runge_kutta_takes(steps):
    sampler = make_sampler("pndm", v_prediction=False, zero_terminal_snr=False)
    set_steps(sampler, steps)
    x = torch.randn(1, 4, 8, 8)
    for t in sampler.timesteps:
        x = sampler.step(torch.randn(1, 4, 8, 8), t, x, return_dict=False)[0]
    assert x.isfinite().all()


def from_the_image(name, strength, mask=None):
    """The picture from itself in 10 steps, by the model that knows it: what is drawn, and the noise that each call finds in what it is shown."""
    torch.manual_seed(0)
    image, noise, found = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), []
    sampler = make_sampler(name, v_prediction=False, zero_terminal_snr=False, from_source=True)
    sampler.set_timesteps(10)
    latents, timesteps = _noised(sampler, image, noise, 10, strength)
    knows = model_that_knows(image, v_prediction=False, zero_terminal_snr=False)

    def model(*inputs):
        found.append(knows(*inputs))
        return found[-1]

    kept = None if mask is None else InpaintBlend(image, noise, mask)
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    drawn = denoise(model, sampler, latents, TOLD, Guidance(1.0), timesteps=timesteps, generators=generators, kept=kept)
    return drawn, image, noise, found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("strength", [1.0, 0.8, 0.3])
@pytest.mark.parametrize(
    "name", [name if name in ASK_AGAIN else pytest.param(name, marks=pytest.mark.long) for name in SAMPLERS]
)
def test_every_sampler_draws_a_image_from_itself_at_every_strength(name, strength):
    """The first call finds the noise that its timestep has; as in the reference, more with samplers of one timestep a step: that of the step before."""
    drawn, image, noise, found = from_the_image(name, strength)
    if "lms" not in name:  # Diffusers' takes coefficients of steps that weren't made
        torch.testing.assert_close(drawn, image, rtol=0, atol=0.2 if name in LEAVE_NOISE else 5e-5)
    steps = int(10 * strength)
    if name in ASK_AGAIN:
        assert len(found) == (steps + 1 if name == "pndm" else 2 * steps - 1)
    else:
        assert len(found) == (steps if name == "dpmsingle" else min(steps, 9))
    if name in ASK_AGAIN or name == "dpmsingle":
        assert float(found[0].std() / noise.std()) == pytest.approx(1, rel=0.02)
    else:
        assert noise.std() < found[0].std() < 3 * noise.std()


@pytest.mark.parametrize("name", ASK_AGAIN)
def test_what_stays_has_the_noise_of_each_timestep_in_the_midst_of_steps_too(name):
    """All of the picture stays, so whatever is drawn, each call finds the noise of its timestep in it."""
    drawn, image, noise, found = from_the_image(name, 0.8, torch.zeros(2, 1, 8, 8))
    assert torch.equal(drawn, image)
    if "dpm_2_a" not in name:  # it draws fresh noise between its two calls
        assert max(float((one - noise).abs().max()) for one in found) < 0.1


def test_lcm_draws_in_more_than_the_50_steps_that_its_models_learned():
    """Up to 50, the timesteps are of those; beyond, they begin at the last one too and are evenly spaced."""
    sampler = make_sampler("lcm", v_prediction=False, zero_terminal_snr=False)
    set_steps(sampler, 4)
    assert sampler.timesteps.tolist() == [999, 759, 499, 259]
    set_steps(sampler, 80)
    assert sampler.timesteps[:5].tolist() == [999, 987, 974, 962, 949] and sampler.timesteps[-1] == 12
    image = torch.randn(2, 4, 8, 8)
    model = model_that_knows(image, v_prediction=False, zero_terminal_snr=False)
    generator = torch.Generator().manual_seed(0)
    drawn = denoise(model, sampler, torch.randn(2, 4, 8, 8), TOLD, Guidance(1.0), timesteps=sampler.timesteps, generators=generator)  # fmt: skip
    torch.testing.assert_close(drawn, image, rtol=0, atol=1e-3)


def test_a_step_is_one_step_however_often_it_asks_the_model():
    """Control nets work for a share of the steps, and the progress bar counts them."""
    sampler = make_sampler("heun", v_prediction=False, zero_terminal_snr=False)
    sampler.set_timesteps(3)
    asked, made = [], []
    denoise(
        model_that_knows(torch.zeros(2, 4, 8, 8), v_prediction=False, zero_terminal_snr=False), sampler,
        torch.randn(2, 4, 8, 8), TOLD, Guidance(1.0), timesteps=sampler.timesteps,
        control_at=lambda *place: asked.append(place), on_step=lambda: made.append(1),
    )  # fmt: skip
    assert asked == [(0, 3), (0, 3), (1, 3), (1, 3), (2, 3)] and len(made) == 3


def test_guidance_by_hand():
    negative, empty, prompt = (torch.full((1, 1, 1, 2), value) for value in (1.0, 2.0, 4.0))
    both = torch.cat([negative, prompt])
    assert torch.equal(Guidance(3.0).applied(both), torch.full((1, 1, 1, 2), 1.0 + 3 * 3))
    three = torch.cat([negative, empty, prompt])
    assert torch.equal(Guidance(3.0, 0.5).applied(three), torch.full((1, 1, 1, 2), 2.0 + 3 * 2 - 0.5 * -1))
    assert torch.equal(Guidance(1.0).applied(prompt), prompt)
    spread = torch.cat(
        [torch.tensor([[[[0.0, 1.0]]]]), torch.tensor([[[[0.0, 2.0]]]])]
    )  # guided: 0 and 1 + 3 * (2 - 1) = 4
    assert torch.allclose(Guidance(3.0, rescale=1.0).applied(spread), torch.tensor([[[[0.0, 2.0]]]]))
    assert torch.allclose(Guidance(3.0, rescale=0.5).applied(spread), torch.tensor([[[[0.0, 3.0]]]]))
