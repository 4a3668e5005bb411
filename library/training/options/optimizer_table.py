"""OptimizerSpec: the one table of what the program knows about optimizers. Torch-free.

Names are sd-scripts' (contract: training_math.md section 5) and case-insensitive. Any other name is
a class of torch.optim or, with dots, of any package. An optimizer gets a short name by a row in
OPTIMIZERS.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class OptimizerSpec:
    """Where an optimizer is found, and what it is like.

    Attributes:
        module: the module that has the class.
        class_name: the class.
        package: what pip installs.
        defaults: arguments that the short name implies.
        bytes_per_param: size of the state for each float32 parameter, counted after a step. The
            state of paged optimizers is counted too, though the driver may move it to RAM.
        is_factored: the state of a matrix is a row and a column.
        is_elementwise: each element of a tensor is known to be stepped by itself, so that a shard
            is stepped as within its tensor.
        finds_lr: finds the learning rate from all gradients together, and takes --learning_rate as
            a factor, one for all groups.
        is_relative_step: computes the learning rate from the step and the size of the weights
            unless relative_step=False is given.
        is_schedule_free: averages the weights itself, and needs no schedule.
        is_paged: keeps its state where the GPU can page it to RAM.
        is_known: the optimizer is in the table.
    """

    module: str
    class_name: str
    package: str
    bytes_per_param: int = 8
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    is_factored: bool = False
    is_elementwise: bool = False
    finds_lr: bool = False
    is_relative_step: bool = False
    is_schedule_free: bool = False
    is_paged: bool = False
    is_known: bool = True

    def finds_relative_step(self, arguments: Mapping[str, Any]) -> bool:
        """Return whether the optimizer computes its learning rate itself with these arguments."""
        return self.is_relative_step and bool(
            arguments.get("relative_step", True) or arguments.get("warmup_init")
        )

    def state_bytes(self, shapes: Iterable[Sequence[int]]) -> int:
        """Return the size of the state of parameters of these shapes; AdamW's if it is unknown."""
        if not self.is_factored:
            return self.bytes_per_param * sum(math.prod(shape) for shape in shapes)
        floats = 0
        for shape in shapes:
            if len(shape) < 2:
                floats += math.prod(shape)
            else:  # of a 3x3 convolution, the last two sizes are its kernel's
                floats += math.prod(shape[:-2]) * (shape[-2] + shape[-1])
        return _FLOAT32 * floats


_FLOAT32 = 4
_NESTEROV = {"momentum": 0.9, "nesterov": True}

# A class of several rows is found at the first one by its dotted name, which implies no arguments.
OPTIMIZERS = {
    "adamw": OptimizerSpec("torch.optim", "AdamW", "torch", 8, is_elementwise=True),
    "adam": OptimizerSpec("torch.optim", "Adam", "torch", 8, is_elementwise=True),
    "nadam": OptimizerSpec("torch.optim", "NAdam", "torch", 8, is_elementwise=True),
    "radam": OptimizerSpec("torch.optim", "RAdam", "torch", 8, is_elementwise=True),
    "rmsprop": OptimizerSpec("torch.optim", "RMSprop", "torch", 4, is_elementwise=True),
    "adagrad": OptimizerSpec("torch.optim", "Adagrad", "torch", 4),
    "sgd": OptimizerSpec("torch.optim", "SGD", "torch", 0, is_elementwise=True),
    "sgdnesterov": OptimizerSpec("torch.optim", "SGD", "torch", 4, _NESTEROV, is_elementwise=True),
    "lion": OptimizerSpec("lion_pytorch", "Lion", "lion-pytorch", 4, is_elementwise=True),
    "adamw8bit": OptimizerSpec("bitsandbytes.optim", "AdamW8bit", "bitsandbytes", 2),
    "pagedadamw": OptimizerSpec("bitsandbytes.optim", "PagedAdamW", "bitsandbytes", 8, is_paged=True),
    "pagedadamw8bit": OptimizerSpec("bitsandbytes.optim", "PagedAdamW8bit", "bitsandbytes", 2, is_paged=True),
    "pagedadamw32bit": OptimizerSpec("bitsandbytes.optim", "PagedAdamW32bit", "bitsandbytes", 8, is_paged=True),
    "lion8bit": OptimizerSpec("bitsandbytes.optim", "Lion8bit", "bitsandbytes", 1),
    "pagedlion8bit": OptimizerSpec("bitsandbytes.optim", "PagedLion8bit", "bitsandbytes", 1, is_paged=True),
    "sgdnesterov8bit": OptimizerSpec("bitsandbytes.optim", "SGD8bit", "bitsandbytes", 1, _NESTEROV),
    "adafactor": OptimizerSpec("transformers.optimization", "Adafactor", "transformers", 1, is_factored=True, is_relative_step=True),
    "prodigy": OptimizerSpec("prodigyopt", "Prodigy", "prodigyopt", 16, finds_lr=True),
    "prodigyplusschedulefree": OptimizerSpec("prodigyplus", "ProdigyPlusScheduleFree", "prodigy-plus-schedule-free", 8, finds_lr=True, is_schedule_free=True),
    "dadaptation": OptimizerSpec("dadaptation.experimental", "DAdaptAdamPreprint", "dadaptation", 12, finds_lr=True),
    "dadaptadampreprint": OptimizerSpec("dadaptation.experimental", "DAdaptAdamPreprint", "dadaptation", 12, finds_lr=True),
    "dadaptadagrad": OptimizerSpec("dadaptation", "DAdaptAdaGrad", "dadaptation", 12, finds_lr=True),
    "dadaptadam": OptimizerSpec("dadaptation", "DAdaptAdam", "dadaptation", 12, finds_lr=True),
    "dadaptadan": OptimizerSpec("dadaptation", "DAdaptAdan", "dadaptation", 20, finds_lr=True),
    "dadaptadanip": OptimizerSpec("dadaptation.experimental", "DAdaptAdanIP", "dadaptation", 20, finds_lr=True),
    "dadaptlion": OptimizerSpec("dadaptation", "DAdaptLion", "dadaptation", 8, finds_lr=True),
    "dadaptsgd": OptimizerSpec("dadaptation", "DAdaptSGD", "dadaptation", 12, finds_lr=True),
    "adamwschedulefree": OptimizerSpec("schedulefree", "AdamWScheduleFree", "schedulefree", 8, is_schedule_free=True),
    "radamschedulefree": OptimizerSpec("schedulefree", "RAdamScheduleFree", "schedulefree", 8, is_schedule_free=True),
    "sgdschedulefree": OptimizerSpec("schedulefree", "SGDScheduleFree", "schedulefree", 4, is_schedule_free=True),
}  # fmt: skip


def optimizer_spec(name: str) -> OptimizerSpec:
    """Return what is known about an optimizer, by its short name or its class."""
    spec = OPTIMIZERS.get(name.lower())
    if spec is not None:
        return spec
    module, _, class_name = name.rpartition(".")
    module = module or "torch.optim"
    package = module.partition(".")[0]
    for spec in OPTIMIZERS.values():
        if spec.class_name == class_name and spec.module.partition(".")[0] == package:
            return dataclasses.replace(spec, module=module, defaults={})
    same_class = OPTIMIZERS.get(class_name.lower(), OPTIMIZERS["adamw"])
    return OptimizerSpec(
        module,
        class_name,
        package,
        bytes_per_param=same_class.bytes_per_param,
        is_factored=same_class.is_factored,
        is_known=False,
    )
