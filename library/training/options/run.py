"""Options of the run: steps, epochs, precision, processes, validation. Torch-free."""

from collections.abc import Iterable
from dataclasses import dataclass

from library.errors import Mistake
from library.options import OptionGroup, option


@dataclass(frozen=True)
class RunOptions(OptionGroup):
    """Run."""

    max_train_steps: int = option(1600, "total number of optimizer steps", at_least=1)
    max_train_epochs: int | None = option(
        None, "total number of epochs; wins over --max_train_steps", at_least=0
    )
    gradient_accumulation_steps: int = option(
        1, "micro-batches per optimizer step and process", at_least=1
    )
    seed: int | None = option(
        None,
        "seed of all random numbers; unset: a random one, which is logged",
        at_least=0,
        at_most=2**63 - 1,
    )
    mixed_precision: str = option(
        "no",
        "dtype of frozen weights and of computation; trained weights stay float32 unless "
        "--full_bf16 or --full_fp16 is given",
        choices=("no", "fp16", "bf16"),
    )
    stop_text_encoder_training: int | None = option(
        None, "train the text encoders for the first N optimizer steps only", unset=(0,)
    )
    ddp_timeout: int | None = option(
        None,
        "minutes after which a process that waits for another one gives up",
        at_least=0,
        affects_result=False,
    )
    ddp_gradient_as_bucket_view: bool = option(
        False,
        "several processes: gradients are views of the all-reduce buckets, which saves memory",
    )
    ddp_static_graph: bool = option(
        False, "several processes: promise that every step uses the same parameters"
    )
    dry_run: bool = option(
        False,
        "check everything, print the plan of the run on one page, and write nothing",
        affects_result=False,
    )

    def mistakes(self) -> Iterable[Mistake]:
        if (self.stop_text_encoder_training or 0) < 0:
            yield Mistake(
                f"--stop_text_encoder_training {self.stop_text_encoder_training}: expected a "
                "number of steps; "
                "--network_train_unet_only freezes the text encoders",
                ("stop_text_encoder_training",),
            )


@dataclass(frozen=True)
class ValidationOptions(OptionGroup):
    """Validation (on the images held out by --validation_split)."""

    validate_every_n_steps: int | None = option(
        None, "validate after every N optimizer steps", at_least=1, unset=(0,), affects_result=False
    )
    validate_every_n_epochs: int | None = option(
        None,
        "validate after every N epochs; unset: after every epoch",
        at_least=1,
        unset=(0,),
        affects_result=False,
    )
    max_validation_steps: int | None = option(
        None, "maximum number of validation batches", at_least=1, unset=(0,), affects_result=False
    )
    save_best: bool = option(
        False,
        "save NAME-best whenever the validation loss is the lowest so far",
        affects_result=False,
    )
    early_stop_patience: int | None = option(
        None,
        "stop after N validations in a row without a lower loss; saves NAME-best too",
        at_least=1,
        unset=(0,),
        affects_result=False,
    )

    @property
    def keeps_best(self) -> bool:
        return self.save_best or self.early_stop_patience is not None
