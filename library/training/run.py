"""Run: everything that the training loop touches; its state is captured and restored here."""

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
from library.training.options.output import ResumeOptions
from library.training.progress import Progress
from library.training.saving.resume import ResumePoint
from library.training.saving.saver import Saver
from library.training.saving.state import State, read_state
from library.training.saving.state_folder import StateMetadata, damaged_state_errors
from library.training.trainable import Trainable


@dataclass(frozen=True)
class Run:
    """Everything that the loop touches.

    Attributes:
        accelerator: this process.
        trainables: what is trained and saved.
        shards: the sharded U-Net; None: it isn't sharded.
        parameters: the parameters that this process steps, by their names in files.
        optimizer_step: turns gradients into new weights.
        ema: the moving average of the weights, if one is kept.
        gradient_check: checks that parameters get gradients and change.
        slowdown: measures steps and warns when they become slower.
        validation: takes the loss of images that are held out.
        best: the lowest validation loss so far.
        keeps_best: the weights of the lowest validation loss are saved.
        preview: generates sample images.
        order: the order of batches.
        batches: makes batches.
        metrics: logs losses, learning rates and samples.
        saver: saves models and states.
        states: which states are saved.
        signature: what must be the same when the run is resumed from its states.
        session_id: of its saved files; a resumed run keeps it.
        options: the options that aren't at their defaults, without secrets, for the report.
        seed: the run's seed.
        first_step: the optimizer steps that a run which isn't resumed takes as done.
        total_steps: optimizer steps of the run.
        num_workers: processes that load batches.
    """

    accelerator: Accelerator
    trainables: Sequence[Trainable]
    shards: Shards | None
    parameters: Mapping[str, nn.Parameter]
    optimizer_step: OptimizerStep
    ema: Ema | None
    gradient_check: GradientFlowCheck
    slowdown: SlowdownDetector
    validation: Validation
    best: Best
    keeps_best: bool
    preview: Preview
    order: BatchSampler
    batches: Batches
    metrics: MetricsLogger
    saver: Saver
    states: ResumeOptions
    signature: Mapping[str, str]
    session_id: str
    options: Mapping[str, object]
    seed: int
    first_step: int
    total_steps: int
    num_workers: int

    @property
    def replicated(self) -> Mapping[str, nn.Parameter]:
        """The parameters that are the same on all processes."""
        return self.parameters if self.shards is None else self.shards.replicated(self.parameters)

    @property
    def rank_and_size(self) -> tuple[int, int]:
        """Rank and world size for work that processes divide: samples and validation.

        Where the model is sharded they all do all of it together.
        """
        if self.shards is not None:
            return 0, 1
        return self.accelerator.process_index, self.accelerator.num_processes

    def accumulations_from(self, step: int) -> Iterator[list[Batch]]:
        """Yield this process's batches of each optimizer step, from a step on, without end."""
        micro_batches = self.order.from_step(step, self.accelerator.process_index)
        is_cuda = self.accelerator.device.type == "cuda"
        batches = load_batches(
            self.batches, micro_batches, num_workers=self.num_workers, pin_memory=is_cuda
        )
        accumulation: list[Batch] = []
        for batch in self.slowdown.batches(batches):
            accumulation.append(batch)
            if batch.position.is_last_microbatch:
                yield accumulation
                accumulation = []


@torch.no_grad()
def copy_weights(saved: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]) -> None:
    """Copy saved weights into parameters. Raises OptionError if names or shapes differ."""
    problems = [
        name for name, p in parameters.items() if name not in saved or saved[name].shape != p.shape
    ]
    problems += [name for name in saved if name not in parameters]
    if problems:
        raise OptionError(
            f"--resume: {len(problems)} tensors of the state don't fit what is trained now ({', '.join(problems[:5])}); "
            "give the network's options that the state was saved with"
        )
    for name, parameter in parameters.items():
        if is_sharded([parameter]):
            parameter.copy_(as_sharded(saved[name], parameter))
        else:
            parameter.copy_(saved[name])


def capture(run: Run, progress: Progress, *, finished: bool) -> State:
    """Return the run's state after an optimizer step whose metrics have been checked.

    Args:
        run: the run.
        progress: how far it is.
        finished: the final model has been saved.
    """
    names = {id(parameter): name for name, parameter in run.parameters.items()}
    metadata = StateMetadata(
        step=progress.step,
        epoch=progress.epoch,
        samples=progress.samples,
        splits=progress.splits,
        finished=finished,
        total_steps=run.total_steps,
        session_id=run.session_id,
        signature=run.signature,
        metrics=run.metrics.state(),
        best=run.best.state(),
        saved=run.saver.saved,
    )
    weights: dict[str, Tensor] = {}
    for trainable in run.trainables:
        weights |= trainable.full_tensors()
    optimizer = run.optimizer_step.state(names)
    if run.shards is not None:
        optimizer["optimizer"] = run.shards.gather_state(optimizer["optimizer"])
    return State(metadata, weights, optimizer, {} if run.ema is None else run.ema.averages)


def restore(run: Run, resumed: ResumePoint) -> Progress:
    """Restore the run from a state, and return its progress.

    Raises:
        OptionError: the state doesn't fit what is trained.
        RunError: the state is damaged.
    """
    state, metadata = read_state(resumed.folder), resumed.metadata
    parameters: dict[str, nn.Parameter] = {}
    for trainable in run.trainables:
        parameters |= trainable.tensors()
    copy_weights(state.weights, parameters)
    names = {id(parameter): name for name, parameter in run.parameters.items()}
    with damaged_state_errors(resumed.folder):
        if run.shards is not None:
            state.optimizer["optimizer"] = run.shards.shard_state(state.optimizer["optimizer"])
        run.optimizer_step.restore(state.optimizer, names, same_options=resumed.is_same)
        if run.ema is not None:
            run.ema.restore(state.ema or state.weights)
        run.metrics.restore(metadata.metrics, metadata.step)
        run.best.restore(metadata.best)
        run.saver.remember({**metadata.saved, resumed.folder.name: [str(resumed.folder)]})
    run.preview.restore()
    log.info(
        "resumed from %s: %d of %d steps are done", resumed.folder, metadata.step, run.total_steps
    )
    epochs, steps_into_epoch = divmod(metadata.step, run.order.steps_per_epoch)
    if steps_into_epoch == 0 and metadata.epoch == epochs - 1:
        epochs -= 1  # saved between an epoch's last step and its end, which is still to come
    return Progress(epochs, metadata.step, metadata.samples, metadata.splits)


def start(run: Run) -> Progress:
    """Return the progress of a run that isn't resumed: none, or --initial_step or --initial_epoch."""
    run.optimizer_step.skip(run.first_step)
    return Progress(epoch=run.first_step // run.order.steps_per_epoch, step=run.first_step)
