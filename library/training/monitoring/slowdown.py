"""Slowdowns: if steps become much slower, the run logs a warning with the likely cause, once."""

import statistics
import time
from collections import deque
from collections.abc import Iterator

import torch

from library.data.batch import Batch
from library.log import log

_MIN_STEPS = 20  # before any step counts as slow
_IN_A_ROW = 3  # slow steps; a single one can have any cause
_SLOW = 2.0  # times the median
_WAITING_FRACTION = 0.5  # of the step's time spent waiting for images
_FULL_FRACTION = 0.95  # of the VRAM that is reserved


class SlowdownDetector:
    """Compares the duration of steps, in seconds per latent pixel, with their median."""

    def __init__(self, device: torch.device):
        self._device = device
        # Of steps at the usual speed, in seconds per latent pixel.
        self._durations: deque[float] = deque(maxlen=500)
        self._waiting: list[float] = []  # fraction of waiting, of the slow steps in a row
        self._seconds_waited, self._latent_pixels = 0.0, 0
        self._last_step: float | None = None
        self._has_warned = False

    def batches(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yield the same batches, and measure how long each is waited for."""
        while True:
            start = time.monotonic()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self._seconds_waited += time.monotonic() - start
            pixels = batch.latents if batch.latents is not None else batch.images
            assert pixels is not None
            self._latent_pixels += len(batch) * pixels.shape[-2] * pixels.shape[-1]
            yield batch

    def paused(self) -> None:
        """Leave the time since the last step out: validation, sample images or a save took it."""
        self._last_step = None

    def step_done(self) -> None:
        """Record the duration of an optimizer step."""
        now = time.monotonic()
        since, waited, latent_pixels = self._last_step, self._seconds_waited, self._latent_pixels
        self._last_step, self._seconds_waited, self._latent_pixels = now, 0.0, 0
        if since is None or self._has_warned or not latent_pixels:
            return
        seconds = max(now - since, 1e-9)
        duration = seconds / latent_pixels
        if len(self._durations) < _MIN_STEPS or duration <= _SLOW * statistics.median(
            self._durations
        ):
            self._durations.append(duration)
            self._waiting = []
            return
        self._waiting.append(waited / seconds)
        if len(self._waiting) >= _IN_A_ROW:
            self._warn(duration / statistics.median(self._durations))

    def _warn(self, factor: float) -> None:
        self._has_warned = True
        log.warning("step time rose to %.1fx its median; likely cause: %s", factor, self._cause())

    def _cause(self) -> str:
        if statistics.mean(self._waiting) > _WAITING_FRACTION:
            return (
                "steps wait for images; use --cache_latents, a larger --max_data_loader_n_workers, or a "
                "faster disk"
            )
        if self._device.type == "cuda":
            total = torch.cuda.get_device_properties(self._device).total_memory
            if torch.cuda.memory_reserved(self._device) > _FULL_FRACTION * total:
                return (
                    "VRAM is full, and the driver may be paging to RAM; lower --train_batch_size, or "
                    "use --gradient_checkpointing"
                )
        return "another process uses the machine, or it is throttled by heat"
