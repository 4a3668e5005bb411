"""Samplers: Diffusers' schedulers with SDXL's noise schedule, by the names that users know (library/generation/sampler_options.py)."""

import inspect
from typing import Any

import torch
from torch import Tensor

from library.generation.sampler_options import SAMPLERS
from library.imports import import_diffusers
from library.models.noise_schedule import BETA_END, BETA_START, NUM_TIMESTEPS, NoiseSchedule

_LEAST_RUNGE_KUTTA = 4  # steps, with which pndm may begin with those of Runge and Kutta
_LEAST_ALPHA_BAR = 2.0**-24  # Diffusers' own, of schedules whose last signal-to-noise ratio is zero


def make_sampler(name: str, *, v_prediction: bool, zero_terminal_snr: bool, from_source: bool = False) -> Any:
    """The Diffusers scheduler of that name, for what the model predicts.

    Args: from_source: it begins at any of its steps (begin_at).
    """
    kind = SAMPLERS[name]
    scheduler = getattr(import_diffusers(), kind.scheduler)
    arguments: dict[str, Any] = {
        "num_train_timesteps": NUM_TIMESTEPS,
        "beta_start": BETA_START,
        "beta_end": BETA_END,
        "beta_schedule": "scaled_linear",
        "prediction_type": "v_prediction" if v_prediction else "epsilon",
        **kind.arguments,
    }
    if from_source and name == "pndm":
        arguments["skip_prk_steps"] = True  # Runge-Kutta steps begin at the first timestep alone
    if zero_terminal_snr:
        arguments |= _zero_terminal_snr(scheduler)
    return scheduler(**arguments)


def set_steps(sampler: Any, steps: int) -> None:
    """Let it draw in so many steps."""
    if steps < _LEAST_RUNGE_KUTTA and "skip_prk_steps" in sampler.config:
        sampler.register_to_config(skip_prk_steps=True)
    if steps > sampler.config.get("original_inference_steps", steps):
        # lcm takes its timesteps from 50; more than those from all, as another multiple would leave out the first ones.
        sampler.set_timesteps(steps, original_inference_steps=NUM_TIMESTEPS)
    else:
        sampler.set_timesteps(steps)


def begin_at(sampler: Any, step: int) -> Tensor:
    """Let drawing begin at a step, counted from 0. Returns the timesteps that are gone through: `sampler.order` of each step."""
    if sampler.config.get("skip_prk_steps"):
        each = sampler.timesteps.unique().flip(0)
        return torch.cat([each[step : step + 2], each[step + 1 :]])  # pndm makes its first step twice
    first = step * sampler.order
    if hasattr(sampler, "set_begin_index"):
        sampler.set_begin_index(first)  # a timestep that is there twice doesn't tell its place
    return sampler.timesteps[first:]


def _zero_terminal_snr(scheduler: Any) -> dict[str, Any]:
    """How a scheduler is told of the schedule: those that don't know it get its betas."""
    if "rescale_betas_zero_snr" in inspect.signature(scheduler.__init__).parameters:
        return {"rescale_betas_zero_snr": True}
    alpha_bar = NoiseSchedule.sdxl(zero_terminal_snr=True).alpha_bar.clamp(min=_LEAST_ALPHA_BAR)
    ratios = alpha_bar.clone()
    ratios[1:] /= alpha_bar[:-1]
    return {"trained_betas": (1 - ratios).tolist()}
