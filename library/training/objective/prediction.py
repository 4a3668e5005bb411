"""Objective: what the model learns to predict."""

from typing import NamedTuple

from library.models.noise_schedule import NoiseSchedule


class Objective(NamedTuple):
    """What the model learns to predict.

    Attributes:
        schedule: the noise schedule.
        v_prediction: the velocity instead of the noise.
    """

    schedule: NoiseSchedule
    v_prediction: bool
