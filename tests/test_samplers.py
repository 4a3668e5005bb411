"""Samplers: with a model that knows the one picture there is, each of them must draw it."""

import pytest
import torch

from library.models.noise_schedule import NoiseSchedule
from library.sampling.denoise import Guidance, Told, denoise
from library.sampling.options import SAMPLERS
from library.sampling.samplers import make_sampler

# These stop at the noise of the first timestep instead of at none.
LEAVE_NOISE = {"pndm", "dpmsolver"}


def model_that_knows(picture, *, v_prediction, zero_terminal_snr):
    """Predicts noise or velocity of the picture exactly, between timesteps too."""
    alpha_bar = NoiseSchedule.sdxl(zero_terminal_snr=zero_terminal_snr).alpha_bar.clamp(min=2.0**-24)
    log_sigmas = ((1 - alpha_bar) / alpha_bar).sqrt().log()

    def predict(x, timesteps, context, vector, extra, shrink):
        below = timesteps[0].floor().long()
        share = timesteps[0] - below
        sigma = torch.lerp(log_sigmas[below], log_sigmas[(below + 1).clamp(max=999)], share.float()).exp()
        alpha = 1 / (sigma**2 + 1)
        noise = (x - alpha.sqrt() * picture) / (1 - alpha).sqrt()
        return alpha.sqrt() * noise - (1 - alpha).sqrt() * picture if v_prediction else noise

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
def test_every_sampler_draws_the_only_picture_that_the_model_knows(name, v_prediction, zero_terminal_snr):
    torch.manual_seed(0)
    picture = torch.randn(2, 4, 8, 8)
    sampler = make_sampler(name, v_prediction=v_prediction, zero_terminal_snr=zero_terminal_snr)
    sampler.set_timesteps(20)
    model = model_that_knows(picture, v_prediction=v_prediction, zero_terminal_snr=zero_terminal_snr)
    told = [Told(torch.zeros(2, 1, 1), torch.zeros(2, 1))]
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    start = torch.randn(2, 4, 8, 8) * sampler.init_noise_sigma
    drawn = denoise(model, sampler, start, told, Guidance(1.0), timesteps=sampler.timesteps, generators=generators)
    torch.testing.assert_close(drawn, picture, rtol=0, atol=0.2 if name in LEAVE_NOISE else 2e-5)


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
