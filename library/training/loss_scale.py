"""LossScale: the factor of float16 losses, which keeps small gradients from becoming 0."""

from typing import Any

from library.errors import RunError

_START, _STEPS, _MAX_OVERFLOWS = 2.0**16, 2000, 20


class LossScale:
    """Halved when gradients overflow, doubled when they haven't for 2000 steps; 1 for other dtypes.

    Source: Micikevicius et al. 2018, arXiv:1710.03740; the numbers are torch.amp.GradScaler's.
    """

    def __init__(self, *, enabled: bool):
        self.enabled = enabled
        self.value = _START if enabled else 1.0
        self._good, self._overflows = 0, 0  # steps in a row

    def stepped(self, *, overflowed: bool) -> None:
        """Take note of a step. Raises RunError when it is no longer a matter of the scale."""
        if not self.enabled:
            return
        self._good, self._overflows = (0, self._overflows + 1) if overflowed else (self._good + 1, 0)
        if overflowed:
            self.value /= 2
        elif self._good == _STEPS:
            self.value, self._good = self.value * 2, 0
        if self._overflows >= _MAX_OVERFLOWS:
            raise RunError(
                f"float16 gradients overflowed in {_MAX_OVERFLOWS} steps in a row; take --mixed_precision bf16 or no, or a lower learning rate"
            )

    def state(self) -> dict[str, Any]:
        return {"value": self.value, "good": self._good, "overflows": self._overflows}

    def restore(self, state: dict[str, Any]) -> None:
        if self.enabled:
            self.value, self._good, self._overflows = state["value"], state["good"], state["overflows"]
