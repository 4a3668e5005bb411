"""The VAE against golden 04, and what happens when it overflows."""

import logging
from pathlib import Path

import pytest
import torch
from tolerance import assert_formula, assert_network

from library.models import vae
from library.safetensors_io import load_tensors

pytestmark = pytest.mark.numeric

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("case", ["a", "b"])
def test_golden_04_encode_and_decode(case, golden_models):
    golden, _ = load_tensors(GOLDEN / "04_vae.safetensors")
    sample = vae.encode(golden_models.vae, golden[f"{case}.image"], golden[f"{case}.noise"])
    assert_network(sample, golden[f"{case}.sample"])
    decoded = vae.decode(golden_models.vae, golden[f"{case}.latents_in"])
    assert_network(decoded, golden[f"{case}.decoded"])


def test_scaling_is_its_own_inverse():
    raw = torch.randn(2, 4, 3, 3)
    assert_formula(vae.unscale_latents(vae.scale_latents(raw)), raw)


class _Overflowing:
    """A stand-in for a VAE whose first image overflows in half precision."""

    def __init__(self, real):
        self.real, self.dtype, self.device = real, torch.float16, torch.device("cpu")

    def to(self, dtype):
        self.dtype = dtype

    def encode(self, images):
        result = self.real.encode(images.float())
        if self.dtype == torch.float16:
            result.latent_dist.mean[0] = float("inf")
        return result

    def decode(self, raw):
        result = self.real.decode(raw.float())
        if self.dtype == torch.float16:
            result.sample[:] = float("nan")
        return result


def test_fault_33_a_image_that_overflows_is_encoded_again_in_float32_and_told(
    golden_models, caplog
):
    logging.getLogger("library").propagate = True
    torch.manual_seed(0)
    images, noise = torch.rand(2, 3, 32, 32) * 2 - 1, torch.randn(2, 4, 4, 4)
    stand_in = _Overflowing(golden_models.vae)
    latents = vae.encode(stand_in, images, noise, lambda: golden_models.vae)
    assert (
        torch.equal(latents[1], vae.encode(golden_models.vae, images.half(), noise)[1])
        or latents[1].isfinite().all()
    )
    assert_network(latents[:1], vae.encode(golden_models.vae, images[:1], noise[:1]))
    assert "1 of 2" in caplog.text and "--no_half_vae" in caplog.text
    assert vae.decode(stand_in, latents, lambda: golden_models.vae).isfinite().all()
