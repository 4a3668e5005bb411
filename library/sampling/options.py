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
_DPM_2 = SamplerKind("KDPM2DiscreteScheduler", {"steps_offset": 1})
_DPM_2_A = SamplerKind("KDPM2AncestralDiscreteScheduler", {"steps_offset": 1})

# Source: contract, training_math.md section 10.
SAMPLERS = {
    "ddim": SamplerKind("DDIMScheduler", {"steps_offset": 1, "clip_sample": False}),
    "pndm": SamplerKind("PNDMScheduler", {"steps_offset": 1}),
    "lms": _LMS,
    "euler": _EULER,
    "euler_a": _EULER_A,
    "heun": SamplerKind("HeunDiscreteScheduler", {"steps_offset": 1}),
    "dpm_2": _DPM_2,
    "dpm_2_a": _DPM_2_A,
    "dpmsolver": SamplerKind(
        "DPMSolverMultistepScheduler",
        {"steps_offset": 1, "algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
    ),
    "dpmsolver++": SamplerKind("DPMSolverMultistepScheduler", {"steps_offset": 1, "algorithm_type": "dpmsolver++"}),
    "dpmsingle": SamplerKind("DPMSolverSinglestepScheduler", {}),
    "k_lms": _LMS,
    "k_euler": _EULER,
    "k_euler_a": _EULER_A,
    "k_dpm_2": _DPM_2,
    "k_dpm_2_a": _DPM_2_A,
}
