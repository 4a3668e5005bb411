"""Samplers by the names that users know: Diffusers' schedulers, with what sets each apart. No torch here."""

from collections.abc import Mapping
from typing import Any, NamedTuple


class SamplerKind(NamedTuple):
    """A class of Diffusers, and the arguments that it gets besides the noise schedule."""

    scheduler: str
    arguments: Mapping[str, Any]


_EULER = SamplerKind("EulerDiscreteScheduler", {"steps_offset": 1})
_EULER_A = SamplerKind("EulerAncestralDiscreteScheduler", {"steps_offset": 1})
_LMS = SamplerKind("LMSDiscreteScheduler", {"steps_offset": 1})
_HEUN = SamplerKind("HeunDiscreteScheduler", {"steps_offset": 1})
_DPM_2 = SamplerKind("KDPM2DiscreteScheduler", {"steps_offset": 1})
_DPM_2_A = SamplerKind("KDPM2AncestralDiscreteScheduler", {"steps_offset": 1})
_DPM_PP = SamplerKind("DPMSolverMultistepScheduler", {"steps_offset": 1, "algorithm_type": "dpmsolver++"})
_DPM_SDE = SamplerKind("DPMSolverMultistepScheduler", {"steps_offset": 1, "algorithm_type": "sde-dpmsolver++"})
_UNI_PC = SamplerKind("UniPCMultistepScheduler", {"steps_offset": 1})


def _karras(kind: SamplerKind) -> SamplerKind:
    """The same with the noise levels of Karras et al. 2022, arXiv:2206.00364, equation 5."""
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
