"""Run: everything that the training loop touches."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from library.data.batch import Batch
from library.data.batch_sampler import BatchSampler
from library.data.loader import Batches, load_batches
from library.errors import OptionError
from library.log import log
from library.training.distributed.sharding import Shards, as_sharded, is_sharded
from library.training.monitoring.metrics import MetricsLogger
from library.training.monitoring.preview import Preview
from library.training.monitoring.sanity_checks import GradientFlowCheck
from library.training.monitoring.slowdown import SlowdownDetector
from library.training.monitoring.validation import Best, Validation
from library.training.optim.ema import Ema
from library.training.optim.optimizer_step import OptimizerStep
from library.training.options.output import (
    ResumeOptions,
)
from library.training.progress import Progress
from library.training.saving.resume import ResumePoint, _damage_told, initial_step
from library.training.saving.saver import Saver
from library.training.saving.state import State, read_state
from library.training.trainable import Trainable


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
    trainables: Sequence[Trainable]
    shards: Shards | None
    trained: Mapping[str, nn.Parameter]
    update: OptimizerStep
    ema: Ema | None
    watch: GradientFlowCheck
    pace: SlowdownDetector
    validation: Validation
    best: Best
    keeps_best: bool
    preview: Preview
    order: BatchSampler
    batches: Batches
    report: MetricsLogger
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

    def accumulations_from(self, step: int) -> Iterator[list[Batch]]:
        """This process's batches of each optimizer step, from a step on, without end."""
        micro_batches = self.order.from_step(step, self.accelerator.process_index)
        batches = load_batches(
            self.batches, micro_batches, num_workers=self.num_workers, pin_memory=self.accelerator.device.type == "cuda"
        )
        window: list[Batch] = []
        for batch in self.pace.batches(batches):
            window.append(batch)
            if batch.place.is_last_microbatch:
                yield window
                window = []


@torch.no_grad()
def copy_weights(saved: Mapping[str, Tensor], wanted: Mapping[str, nn.Parameter]) -> None:
    """Raises OptionError if names or shapes differ."""
    problems = [name for name in wanted if name not in saved or saved[name].shape != wanted[name].shape]
    problems += [name for name in saved if name not in wanted]
    if problems:
        raise OptionError(
            f"--resume: {len(problems)} tensors of the state don't fit what is trained now ({', '.join(problems[:5])}); "
            "give the network's options that the state was saved with"
        )
    for name, tensor in wanted.items():
        tensor.copy_(as_sharded(saved[name], tensor) if is_sharded([tensor]) else saved[name])


def capture(run: Run, progress: Progress, *, finished: bool) -> State:
    """The run's state after an optimizer step whose numbers are settled. Args: finished: and after its final save."""
    names = {id(parameter): name for name, parameter in run.trained.items()}
    facts = {
        "step": progress.step,
        "epoch": progress.epoch,
        "samples": progress.samples,
        "splits": progress.splits,
        "finished": finished,
        "total_steps": run.total_steps,
        "session_id": run.session_id,
        "run": dict(run.facts),
        "report": run.report.state(),
        "best": run.best.state(),
        "saved": run.saver.saved,
    }
    weights = {name: tensor for trainable in run.trainables for name, tensor in trainable.full_tensors().items()}
    update = run.update.state(names)
    if run.shards is not None:
        update["optimizer"] = run.shards.gathered(update["optimizer"])
    return State(facts, weights, update, {} if run.ema is None else run.ema.averages)


def restore(run: Run, resumed: ResumePoint) -> Progress:
    """Bring the run to where the state was saved. Raises OptionError if it doesn't fit, RunError if it is damaged."""
    state, facts = read_state(resumed.folder), resumed.facts
    copy_weights(
        state.weights, {name: tensor for trainable in run.trainables for name, tensor in trainable.tensors().items()}
    )
    names = {id(parameter): name for name, parameter in run.trained.items()}
    with _damage_told(resumed.folder):
        if run.shards is not None:
            state.optimizer["optimizer"] = run.shards.cut(state.optimizer["optimizer"])
        run.update.restore(state.optimizer, names, same_options=resumed.is_same)
        if run.ema is not None:
            run.ema.restore(state.ema or state.weights)
        run.report.restore(facts["report"], facts["step"])
        run.best.restore(facts["best"])
        run.saver.remember({**facts["saved"], resumed.folder.name: [str(resumed.folder)]})
    run.preview.recall()
    log.info("resumed from %s: %d of %d steps are done", resumed.folder, facts["step"], run.total_steps)
    epochs, steps_into_it = divmod(facts["step"], run.order.steps_per_epoch)
    # A save between an epoch's last step and its end hasn't counted it yet.
    is_before_end = not steps_into_it and facts["epoch"] == epochs - 1
    return Progress(epochs - is_before_end, facts["step"], facts["samples"], facts["splits"])


def place_to_start(run: Run, options: ResumeOptions) -> Progress:
    """Where a run without a state begins: at its start, or at --initial_step or --initial_epoch."""
    steps = run.order.steps_per_epoch
    step = initial_step(options, steps_per_epoch=steps, total_steps=run.total_steps)
    run.update.skip(step)
    return Progress(epoch=step // steps, step=step)
