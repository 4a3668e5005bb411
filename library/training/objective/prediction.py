"""Prediction."""

from typing import NamedTuple

from library.models.noise_schedule import NoiseSchedule


class Objective(NamedTuple):
    """What the model learns to predict, and on which noise schedule."""

    schedule: NoiseSchedule
    v_prediction: bool
