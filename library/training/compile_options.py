"""Options of --torch_compile. No torch here."""

from dataclasses import dataclass

from library.options import OptionGroup, option

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
