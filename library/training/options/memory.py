"""Options that trade speed for memory. Torch-free."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from library.errors import Mistake
from library.options import OptionGroup, option


@dataclass(frozen=True)
class MemoryOptions(OptionGroup):
    """Memory."""

    memory_plan: str | None = option(
        None,
        "choose the options of this group that don't change the result: fast: nothing is "
        "offloaded; auto: what fits into the GPU's free memory at the least loss of speed; a "
        "number: the same for a GPU of that many GB",
        affects_result=False,
    )
    gradient_checkpointing: bool = option(
        False,
        "keep fewer activations and recompute them in backward: a third slower, far less memory",
        affects_result=False,
    )
    checkpoint_policy: str = option(
        "full",
        "what --gradient_checkpointing recomputes: full: complete blocks; selective: only norms "
        "and element-wise products, which keeps half of the memory and costs almost no time",
        choices=("full", "selective"),
        affects_result=False,
    )
    cpu_offload_checkpointing: bool = option(
        False,
        "keep the activations that --gradient_checkpointing stores in RAM, and copy them back "
        "ahead of their use; for large batches",
        affects_result=False,
    )

    blocks_to_swap: int | None = option(
        None,
        "keep the N largest of the U-Net's 87 blocks in RAM and copy each to the GPU while it runs",
        at_least=1,
        unset=(0,),
        affects_result=False,
    )
    optimizer_offload: bool = option(
        False,
        "keep the optimizer state in RAM and copy it to the GPU tensor by tensor, while that is "
        "stepped",
        affects_result=False,
    )
    fp8_base: bool = option(
        False,
        "keep the linear layers of the frozen base model in float8 (e4m3), half the size of "
        "bfloat16; networks only",
    )
    fp8_base_unet: bool = option(False, "like --fp8_base, but only for the U-Net")
    base_quant: str | None = option(
        None,
        "keep the linear layers of the frozen base model in int8, or in nf4, a quarter the size "
        "of bfloat16; networks only",
        choices=("int8", "nf4"),
    )

    @property
    def quantized(self) -> dict[str, str]:
        """The quantization of each component of the base model that is quantized."""
        kind = "fp8" if self.fp8_base or self.fp8_base_unet else self.base_quant
        if kind is None:
            return {}
        components = ["unet"]
        if not self.fp8_base_unet:
            components += ["text_encoder_1", "text_encoder_2"]
        return dict.fromkeys(components, kind)

    def mistakes(self) -> Iterable[Mistake]:
        if self.memory_plan not in (None, "fast", "auto") and not _is_size(str(self.memory_plan)):
            yield Mistake(
                f"--memory_plan {self.memory_plan!r}: expected fast, auto, or the GPU's memory in "
                "GB, say 12",
                ("memory_plan",),
            )
        for name in ("checkpoint_policy", "cpu_offload_checkpointing"):
            if getattr(self, name) not in (False, "full") and not self.gradient_checkpointing:
                yield Mistake(
                    f"--{name} needs --gradient_checkpointing", (name, "gradient_checkpointing")
                )
        recomputes_blocks = self.gradient_checkpointing and self.checkpoint_policy == "full"
        if self.blocks_to_swap and not recomputes_blocks:
            yield Mistake(
                "--blocks_to_swap needs --gradient_checkpointing with --checkpoint_policy full: "
                "activations that are saved for backward would keep the weights on the GPU",
                ("blocks_to_swap", "gradient_checkpointing", "checkpoint_policy"),
            )
        if self.base_quant and (self.fp8_base or self.fp8_base_unet):
            yield Mistake(
                "--base_quant and --fp8_base both quantize the base model; give one",
                ("base_quant",),
            )


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
    """torch.compile."""

    torch_compile: bool = option(
        False,
        "compile the U-Net's blocks in the first steps; if that fails, log why and continue without",
    )
    dynamo_backend: str = option(
        "inductor", "backend of --torch_compile", choices=_BACKENDS, unset=("no", "NO")
    )
