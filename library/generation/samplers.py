"""Samplers by the names that users know: Diffusers' schedulers with SDXL's noise schedule.

This module doesn't import torch by itself, because options list the samplers' names.
"""

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from library.imports import import_diffusers

if TYPE_CHECKING:
    from torch import Tensor

_MIN_RUNGE_KUTTA_STEPS = 4  # with fewer steps pndm can't begin with Runge-Kutta steps
_MIN_ALPHA_BAR = 2.0**-24  # Diffusers' own bound for schedules with zero terminal SNR


class SamplerKind(NamedTuple):
    """A scheduler class of Diffusers, and its arguments in addition to the noise schedule."""

    scheduler: str
    arguments: Mapping[str, Any]


_EULER = SamplerKind("EulerDiscreteScheduler", {"steps_offset": 1})
_EULER_A = SamplerKind("EulerAncestralDiscreteScheduler", {"steps_offset": 1})
_LMS = SamplerKind("LMSDiscreteScheduler", {"steps_offset": 1})
_HEUN = SamplerKind("HeunDiscreteScheduler", {"steps_offset": 1})
_DPM_2 = SamplerKind("KDPM2DiscreteScheduler", {"steps_offset": 1})
_DPM_2_A = SamplerKind("KDPM2AncestralDiscreteScheduler", {"steps_offset": 1})
_DPM_PP = SamplerKind(
    "DPMSolverMultistepScheduler", {"steps_offset": 1, "algorithm_type": "dpmsolver++"}
)
_DPM_SDE = SamplerKind(
    "DPMSolverMultistepScheduler", {"steps_offset": 1, "algorithm_type": "sde-dpmsolver++"}
)
_UNI_PC = SamplerKind("UniPCMultistepScheduler", {"steps_offset": 1})


def _karras(kind: SamplerKind) -> SamplerKind:
    """Use the noise levels of Karras et al. 2022, arXiv:2206.00364, equation 5."""
    return SamplerKind(kind.scheduler, {**kind.arguments, "use_karras_sigmas": True})


# The first sixteen are the reference's. Source: contract, training_math.md section 10.
SAMPLERS = {
    "ddim": SamplerKind("DDIMScheduler", {"steps_offset": 1, "clip_sample": False}),
    "pndm": SamplerKind("PNDMScheduler", {"steps_offset": 1}),
    "lms": _LMS,
    "euler": _EULER,
    "euler_a": _EULER_A,
    "heun": _HEUN,
    "dpm_2": _DPM_2,
    "dpm_2_a": _DPM_2_A,
    "dpmsolver": SamplerKind(
        "DPMSolverMultistepScheduler",
        {"steps_offset": 1, "algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
    ),
    "dpmsolver++": _DPM_PP,
    "dpmsingle": SamplerKind("DPMSolverSinglestepScheduler", {}),
    "k_lms": _LMS,
    "k_euler": _EULER,
    "k_euler_a": _EULER_A,
    "k_dpm_2": _DPM_2,
    "k_dpm_2_a": _DPM_2_A,
    "dpmsolver++_sde": _DPM_SDE,
    "uni_pc": _UNI_PC,
    "lcm": SamplerKind("LCMScheduler", {"steps_offset": 1, "clip_sample": False}),
    "lms_karras": _karras(_LMS),
    "euler_karras": _karras(_EULER),
    "heun_karras": _karras(_HEUN),
    "dpm_2_karras": _karras(_DPM_2),
    "dpm_2_a_karras": _karras(_DPM_2_A),
    "dpmsolver++_karras": _karras(_DPM_PP),
    "dpmsolver++_sde_karras": _karras(_DPM_SDE),
    "uni_pc_karras": _karras(_UNI_PC),
}


def make_sampler(
    name: str, *, v_prediction: bool, zero_terminal_snr: bool, from_init_image: bool = False
) -> Any:
    """Build the Diffusers scheduler of a sampler.

    Args:
        name: a key of SAMPLERS.
        v_prediction: whether the model predicts velocity instead of noise.
        zero_terminal_snr: whether the last timestep is pure noise.
        from_init_image: whether denoising may begin at any step (`begin_at`).
    """
    from library.models.noise_schedule import BETA_END, BETA_START, NUM_TIMESTEPS

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
    if from_init_image and name == "pndm":
        arguments["skip_prk_steps"] = True  # Runge-Kutta steps can only begin at the first timestep
    if zero_terminal_snr:
        arguments |= _zero_terminal_snr_arguments(scheduler)
    return scheduler(**arguments)


def set_steps(sampler: Any, steps: int) -> None:
    """Set the sampler's timesteps for this number of steps."""
    from library.models.noise_schedule import NUM_TIMESTEPS

    if steps < _MIN_RUNGE_KUTTA_STEPS and "skip_prk_steps" in sampler.config:
        sampler.register_to_config(skip_prk_steps=True)
    if steps > sampler.config.get("original_inference_steps", steps):
        # lcm picks its timesteps from 50. More than 50 are picked from all timesteps, because
        # another multiple would leave out the first ones.
        sampler.set_timesteps(steps, original_inference_steps=NUM_TIMESTEPS)
    else:
        sampler.set_timesteps(steps)


def begin_at(sampler: Any, step: int) -> "Tensor":
    """Make denoising begin at a step (0-based).

    Returns:
        The remaining timesteps, `sampler.order` for each step.
    """
    import torch

    if sampler.config.get("skip_prk_steps"):
        timesteps = sampler.timesteps.unique().flip(0)
        # pndm runs its first step twice.
        return torch.cat([timesteps[step : step + 2], timesteps[step + 1 :]])
    first = step * sampler.order
    if hasattr(sampler, "set_begin_index"):
        sampler.set_begin_index(first)  # a timestep that occurs twice doesn't identify its index
    return sampler.timesteps[first:]


def _zero_terminal_snr_arguments(scheduler: Any) -> dict[str, Any]:
    """Return the arguments that give a Diffusers scheduler the betas of zero terminal SNR."""
    from library.models.noise_schedule import NoiseSchedule

    if "rescale_betas_zero_snr" in inspect.signature(scheduler.__init__).parameters:
        return {"rescale_betas_zero_snr": True}
    schedule = NoiseSchedule.sdxl(zero_terminal_snr=True)
    alpha_bar = schedule.alpha_bar.clamp(min=_MIN_ALPHA_BAR)
    ratios = alpha_bar.clone()
    ratios[1:] /= alpha_bar[:-1]
    return {"trained_betas": (1 - ratios).tolist()}
