"""Progress: how far a run is."""

from dataclasses import dataclass


@dataclass
class Progress:
    """Attributes:
    epoch: epochs finished.
    step: optimizer steps done.
    samples: pictures seen, repeats counted, over all processes.
    splits: parts that each micro-batch is computed in; more than 1 once memory ran out.
    """

    epoch: int = 0
    step: int = 0
    samples: int = 0
    splits: int = 1
