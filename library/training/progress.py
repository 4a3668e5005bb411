"""Progress: how far a run is."""

from dataclasses import dataclass


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        epoch: epochs finished.
        step: optimizer steps done.
        samples: images seen, repeats included, over all processes.
        splits: parts that each micro-batch is computed in; more than 1 once memory has run out.
    """

    epoch: int = 0
    step: int = 0
    samples: int = 0
    splits: int = 1
