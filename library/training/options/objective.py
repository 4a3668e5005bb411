"""Options of the objective: noise, timesteps and loss. Torch-free."""

from collections.abc import Iterable
from dataclasses import dataclass

from library.errors import Mistake
from library.options import OptionGroup, option


@dataclass(frozen=True)
class NoiseOptions(OptionGroup):
    """Noise."""

    noise_offset: float | None = option(
        None,
        "strength of a noise that shifts each channel, for very dark and very bright images",
        at_least=0,
    )
    noise_offset_random_strength: bool = option(
        False, "sample each image's strength between 0 and --noise_offset"
    )
    adaptive_noise_scale: float | None = option(
        None,
        "factor of each latent channel's absolute mean, which is added to --noise_offset",
        unset=(0, 0.0),
    )
    multires_noise_iterations: int | None = option(
        None, "number of levels of coarser noise added to the noise", at_least=0
    )
    multires_noise_discount: float = option(
        0.3,
        "strength of each level of --multires_noise_iterations relative to the one before",
        at_least=0,
    )
    ip_noise_gamma: float | None = option(
        None,
        "strength of input perturbation noise (added to the input, not to the target)",
        at_least=0,
    )
    ip_noise_gamma_random_strength: bool = option(
        False, "sample each image's strength between 0 and --ip_noise_gamma"
    )
    min_timestep: int | None = option(
        None, "lowest timestep that is sampled; 0 when unset", at_least=0, at_most=999
    )
    max_timestep: int | None = option(
        None, "timesteps below this one are sampled; 1000 when unset", at_least=1, at_most=1000
    )
    timestep_sampling: str = option(
        "uniform",
        "how timesteps are distributed over that range: evenly, around the middle (logit_normal, "
        "cosmap), or by mode",
        choices=("uniform", "logit_normal", "mode", "cosmap"),
        unset=("sigma",),
    )
    logit_mean: float = option(0.0, "mean of logit_normal: above 0 for more noise, below for less")
    logit_std: float = option(1.0, "standard deviation of logit_normal", above=0)
    mode_scale: float = option(
        1.29,
        "scale of mode: above 0 for timesteps near the middle, below for both ends",
        at_least=-1,
        at_most=1.75,
    )

    def mistakes(self) -> Iterable[Mistake]:
        if self.adaptive_noise_scale is not None and not self.noise_offset:
            yield Mistake(
                "--adaptive_noise_scale needs --noise_offset, which it is added to",
                ("noise_offset",),
            )
        low, high = self.min_timestep or 0, 1000 if self.max_timestep is None else self.max_timestep
        if low > high or low == 1000:
            yield Mistake(
                f"--min_timestep {low} is above --max_timestep {high}: no timestep lies between "
                "them",
                ("min_timestep", "max_timestep"),
            )


@dataclass(frozen=True)
class LossOptions(OptionGroup):
    """Loss."""

    loss_type: str = option(
        "l2", "loss of each element", choices=("l2", "l1", "huber", "smooth_l1")
    )
    huber_schedule: str = option(
        "snr",
        "how the threshold of huber and smooth_l1 depends on the timestep",
        choices=("constant", "exponential", "snr"),
    )
    huber_c: float = option(
        0.1, "threshold of huber and smooth_l1 between squared and absolute loss", above=0
    )
    huber_scale: float = option(
        1.0, "factor of the threshold; not used by --huber_schedule snr", above=0
    )
    min_snr_gamma: float | None = option(
        None, "cap each timestep's weight at this signal-to-noise ratio (5 is usual)", at_least=0
    )
    scale_v_pred_loss_like_noise_pred: bool = option(
        False, "weight the loss of a velocity model like that of a noise model"
    )
    v_pred_like_loss: float | None = option(
        None, "add the loss weighted like a velocity model's, times this factor", at_least=0
    )
    masked_loss: bool = option(
        False,
        "weight the loss by the masks in --conditioning_data_dir; --alpha_mask uses the images' "
        "alpha channels",
    )
    debiased_estimation_loss: bool = option(
        False, "weight the loss by 1 / sqrt(SNR); for velocity models by 1 / (SNR + 1)"
    )
