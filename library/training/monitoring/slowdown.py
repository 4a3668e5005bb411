"""Pace: how long steps take; steps that become much slower are told once, with what is likely the cause."""

import statistics
import time
from collections import deque
from collections.abc import Iterator

import torch

from library.data.batch import Batch
from library.log import log

_KNOWN = 20  # steps before any is called slow
_IN_A_ROW = 3  # slow steps: one alone may be anything
_SLOW = 2.0  # times the median
_WAITING, _FULL = 0.5, 0.95  # share of the step spent waiting for pictures; of the card's memory that is taken


class SlowdownDetector:
    """Seconds per latent cell, so that buckets of different sizes compare. Time is monotonic: clocks may jump."""

    def __init__(self, device: torch.device):
        self._device = device
        self._usual: deque[float] = deque(maxlen=500)
        self._slow: list[float] = []  # shares of waiting of slow steps in a row
        self._waited, self._cells = 0.0, 0
        self._since: float | None = None
        self._is_told = False

    def batches(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches; how long each was waited for is counted."""
        while True:
            start = time.monotonic()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self._waited += time.monotonic() - start
            pixels = batch.latents if batch.latents is not None else batch.images
            assert pixels is not None
            self._cells += len(batch) * pixels.shape[-2] * pixels.shape[-1]
            yield batch

    def paused(self) -> None:
        """Something else than a step was done: validating, drawing, saving."""
        self._since = None

    def step(self) -> None:
        """An optimizer step is done."""
        now = time.monotonic()
        since, waited, cells = self._since, self._waited, self._cells
        self._since, self._waited, self._cells = now, 0.0, 0
        if since is None or self._is_told or not cells:
            return
        seconds = max(now - since, 1e-9)
        if len(self._usual) >= _KNOWN and seconds / cells > _SLOW * statistics.median(self._usual):
            self._slow.append(waited / seconds)
            if len(self._slow) >= _IN_A_ROW:
                self._tell(seconds / cells / statistics.median(self._usual))
        else:
            self._slow = []
            self._usual.append(seconds / cells)

    def _tell(self, times: float) -> None:
        self._is_told = True
        log.warning("steps take %.1f times as long as before: %s", times, self._cause())

    def _cause(self) -> str:
        if statistics.mean(self._slow) > _WAITING:
            return "they wait for pictures; take --cache_latents, more --max_data_loader_n_workers, or a faster disk"
        if self._device.type == "cuda":
            total = torch.cuda.get_device_properties(self._device).total_memory
            if torch.cuda.memory_reserved(self._device) > _FULL * total:
                return "the card's memory is full, and its driver may be paging to RAM; lower --train_batch_size, or take --gradient_checkpointing"
        return "probably another program uses the machine, or it is too hot"
