"""Slowdowns: much slower steps are logged once, with the likely cause."""

import torch

from library.data.batch import Batch
from library.data.batch_sampler import BatchPosition
from library.training.monitoring import slowdown
from library.training.monitoring.slowdown import SlowdownDetector


class Clock:
    now = 0.0

    def monotonic(self):
        return self.now


def batches(clock, waits):
    size = torch.zeros(1, 2, dtype=torch.int64)
    for wait in waits:
        clock.now += wait
        yield Batch(BatchPosition(0, 0, 0, 0, 1, True, False), ("a",), ("",), None, torch.zeros(1, 4, 8, 8), None, size, size, size, torch.ones(1))  # fmt: skip


def warnings_of(monkeypatch, steps, *, pause_at=None):
    """The warnings for steps given as (seconds waited for the batch, seconds computed)."""
    clock, warnings = Clock(), []
    monkeypatch.setattr(slowdown, "time", clock)
    monkeypatch.setattr(slowdown.log, "warning", lambda text, *args: warnings.append(text % args))
    detector = SlowdownDetector(torch.device("cpu"))
    for i, _ in enumerate(detector.batches(batches(clock, [wait for wait, _ in steps]))):
        clock.now += steps[i][1]
        detector.step_done()
        if i == pause_at:
            clock.now += 1000
            detector.paused()
    return warnings


def test_much_slower_steps_are_logged_once_with_their_cause(monkeypatch):
    usual = [(0.1, 0.9)] * 30
    (warning,) = warnings_of(monkeypatch, [*usual, *[(0.1, 2.9)] * 10])
    assert warning.startswith("step time rose to 3.0x its median") and "another process" in warning
    (warning,) = warnings_of(monkeypatch, [*usual, *[(2.5, 0.5)] * 10])
    assert "steps wait for images" in warning and "--cache_latents" in warning


def test_a_single_slow_step_a_pause_and_a_slow_start_are_not_logged(monkeypatch):
    usual = [(0.1, 0.9)] * 30
    assert warnings_of(monkeypatch, [(0, 60), (0, 5), *usual, (0.1, 20), *usual], pause_at=20) == []
