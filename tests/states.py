"""Training states for tests."""

from typing import Any

from library.training.saving.state_folder import StateMetadata


def state_metadata(step: int = 0, **values: Any) -> StateMetadata:
    """The metadata of a run of 10 steps, at one of them."""
    defaults: dict[str, Any] = {
        "step": step,
        "epoch": 0,
        "samples": step,
        "splits": 1,
        "finished": False,
        "total_steps": 10,
        "session_id": "1",
        "signature": {"seed": "7"},
        "metrics": {},
        "best": {},
        "saved": {},
    }
    return StateMetadata(**defaults | values)
