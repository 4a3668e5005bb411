"""Samplers: Diffusers' schedulers with SDXL's noise schedule, by the names that users know."""

from typing import Any

from library.imports import import_diffusers
from library.models.noise_schedule import BETA_END, BETA_START, NUM_TIMESTEPS

SAMPLERS = {"ddim": "DDIMScheduler", "euler": "EulerDiscreteScheduler", "euler_a": "EulerAncestralDiscreteScheduler"}


def make_sampler(name: str, *, v_prediction: bool, zero_terminal_snr: bool) -> Any:
    """The Diffusers scheduler of that name, for what the model predicts."""
    own = {"clip_sample": False} if name == "ddim" else {}
    return getattr(import_diffusers(), SAMPLERS[name])(
        num_train_timesteps=NUM_TIMESTEPS,
        beta_start=BETA_START,
        beta_end=BETA_END,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction" if v_prediction else "epsilon",
        rescale_betas_zero_snr=zero_terminal_snr,
        steps_offset=1,
        **own,
    )
