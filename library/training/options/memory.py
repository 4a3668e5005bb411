"""Options that trade speed for memory. No torch here."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from library.errors import Mistake
from library.options import OptionGroup, option


@dataclass(frozen=True)
class MemoryOptions(OptionGroup):
    """Memory"""

    memory_plan: str | None = option(
        None,
        "choose what of this group changes no result: fast: everything stays on the card; auto: what fits into its free memory with the "
        "least loss of time; a number: the same for a card of so many GB",
        affects_result=False,
    )
    gradient_checkpointing: bool = option(
        False,
        "keep fewer activations and compute them again in backward: a third slower, far less memory",
        affects_result=False,
    )
    checkpoint_policy: str = option(
        "full",
        "what --gradient_checkpointing computes again: whole blocks, or (selective) only norms and products of single numbers, "
        "which keeps half of the memory and costs next to no time",
        choices=("full", "selective"),
        affects_result=False,
    )
    cpu_offload_checkpointing: bool = option(
        False,
        "what --gradient_checkpointing keeps waits in RAM, and returns ahead of its use; for large batches",
        affects_result=False,
    )

    blocks_to_swap: int | None = option(
        None,
        "so many of the U-Net's blocks, the largest first, lie in RAM and visit the card while they are computed with; SDXL has 87",
        at_least=1,
        unset=(0,),
        affects_result=False,
    )
    optimizer_offload: bool = option(
        False,
        "the optimizer's state lies in RAM and visits the card tensor by tensor, while that is stepped",
        affects_result=False,
    )
    fp8_base: bool = option(
        False,
        "the frozen base model's linear layers are kept in float8 (e4m3), half of bfloat16's memory; networks only",
    )
    fp8_base_unet: bool = option(False, "as --fp8_base, but the text encoders stay as they are")
    base_quant: str | None = option(
        None,
        "the frozen base model's linear layers are kept in int8, or in nf4, a quarter of bfloat16's memory; networks only",
        choices=("int8", "nf4"),
    )

    @property
    def quantized(self) -> dict[str, str]:
        """How the base model's parts are kept, where not in the compute dtype."""
        kind = "fp8" if self.fp8_base or self.fp8_base_unet else self.base_quant
        parts = ("unet",) if self.fp8_base_unet else ("unet", "text_encoder_1", "text_encoder_2")
        return {} if kind is None else dict.fromkeys(parts, kind)

    def mistakes(self) -> Iterable[Mistake]:
        if self.memory_plan not in (None, "fast", "auto") and not _is_size(str(self.memory_plan)):
            yield Mistake(
                f"--memory_plan {self.memory_plan!r}: expected fast, auto, or the card's memory in GB, say 12",
                ("memory_plan",),
            )
        for name in ("checkpoint_policy", "cpu_offload_checkpointing"):
            if getattr(self, name) not in (False, "full") and not self.gradient_checkpointing:
                yield Mistake(f"--{name} needs --gradient_checkpointing", (name, "gradient_checkpointing"))
        if self.blocks_to_swap and not (self.gradient_checkpointing and self.checkpoint_policy == "full"):
            yield Mistake(
                "--blocks_to_swap needs --gradient_checkpointing, and that whole blocks are computed again (--checkpoint_policy full): "
                "activations that are kept for backward would hold the weights on the card",
                ("blocks_to_swap", "gradient_checkpointing", "checkpoint_policy"),
            )
        if self.base_quant and (self.fp8_base or self.fp8_base_unet):
            yield Mistake("--base_quant and --fp8_base both say how the base model is kept; give one", ("base_quant",))


def _is_size(text: str) -> bool:
    try:
        return 0 < float(text) < math.inf
    except ValueError:
        return False


_BACKENDS = [
    "eager",
    "aot_eager",
    "inductor",
    "aot_ts_nvfuser",
    "nvprims_nvfuser",
    "cudagraphs",
    "ofi",
    "fx2trt",
    "onnxrt",
    "tensort",
    "ipex",
    "tvm",
]


@dataclass(frozen=True)
class CompileOptions(OptionGroup):
    """Compiling"""

    torch_compile: bool = option(
        False,
        "compile the U-Net's blocks in the first steps; if that doesn't work, the run tells why and goes on without",
    )
    dynamo_backend: str = option("inductor", "compiler of --torch_compile", choices=_BACKENDS, unset=("no", "NO"))
