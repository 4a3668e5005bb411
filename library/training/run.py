"""Run: everything that the training loop touches."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from accelerate import Accelerator
from torch import nn

from library.data.batch import Batch
from library.data.dataset import Batches, load_batches
from library.data.order import Order
from library.training.ema import Ema
from library.training.output_options import ResumeOptions
from library.training.pace import Pace
from library.training.preview import Preview
from library.training.report import Report
from library.training.saving import Saver
from library.training.sharding import Shards
from library.training.task import Part
from library.training.update import Update
from library.training.validation import Best, Validation
from library.training.watch import Watch


@dataclass(frozen=True)
class Run:
    """Everything that the loop touches.

    Attributes:
        shards: which part of it this process steps; None: all.
        trained: everything that an optimizer changes, by its name in files.
        keeps_best: whether the weights of the lowest validation loss are saved.
        facts: what a state says of the run, and what must be the same when it is resumed.
        session_id: of its saved files; a resumed run keeps it.
        shown: options for the report; no secrets.
        total_steps: optimizer steps of the whole run.
    """

    accelerator: Accelerator
    parts: Sequence[Part]
    shards: Shards | None
    trained: Mapping[str, nn.Parameter]
    update: Update
    ema: Ema | None
    watch: Watch
    pace: Pace
    validation: Validation
    best: Best
    keeps_best: bool
    preview: Preview
    order: Order
    batches: Batches
    report: Report
    saver: Saver
    states: ResumeOptions
    facts: Mapping[str, str]
    session_id: str
    shown: Mapping[str, object]
    seed: int
    total_steps: int
    num_workers: int

    @property
    def replicated(self) -> Mapping[str, nn.Parameter]:
        """What is trained and the same on all processes."""
        return self.trained if self.shards is None else self.shards.replicated(self.trained)

    @property
    def share(self) -> tuple[int, int]:
        """(rank, processes) among those that draw and validate for themselves; they all do all where the model is sharded."""
        accelerator = self.accelerator
        return (0, 1) if self.shards is not None else (accelerator.process_index, accelerator.num_processes)

    def windows_from(self, step: int) -> Iterator[list[Batch]]:
        """This process's batches of each optimizer step, from a step on, without end."""
        micro_batches = self.order.from_step(step, self.accelerator.process_index)
        batches = load_batches(
            self.batches, micro_batches, num_workers=self.num_workers, pin_memory=self.accelerator.device.type == "cuda"
        )
        window: list[Batch] = []
        for batch in self.pace.batches(batches):
            window.append(batch)
            if batch.place.closes_window:
                yield window
                window = []
