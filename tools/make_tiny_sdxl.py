"""Make a tiny SDXL with random weights: the keys and the topology of the real one, in 80 MB. For tests and a first try.

python tools/make_tiny_sdxl.py --output tiny_sdxl.safetensors
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library.errors import OptionError, run
from library.options import OptionGroup, option, read_options


@dataclass(frozen=True)
class TinyOptions(OptionGroup):
    """The model."""

    output: Path = option(Path("tiny_sdxl.safetensors"), "file to write")
    seed: int = option(0, "seed of the weights")
    twin: str = option(
        "base",
        "which SDXL it is a tiny twin of",
        choices=("base", "ssd-1b", "vega", "refiner", "inpainting"),
    )
    precision: str = option("float", "dtype of the weights", choices=("float", "fp16", "bf16"))
    v_prediction: bool = option(
        False, "mark it as a model that predicts velocity, with zero terminal SNR"
    )


def main(argv: list[str] | None = None) -> None:
    chosen = read_options(__doc__, [TinyOptions], argv)[TinyOptions]
    if chosen.output.suffix != ".safetensors":
        raise OptionError(f"--output {chosen.output}: expected a name that ends in .safetensors")
    from library.device import DTYPES
    from library.safetensors_io import write_safetensors
    from tools.tiny_models import tiny_checkpoint

    tensors = tiny_checkpoint(chosen.seed, twin=chosen.twin, v_prediction=chosen.v_prediction)
    dtype = DTYPES[chosen.precision]
    chosen.output.parent.mkdir(parents=True, exist_ok=True)
    write_safetensors(
        chosen.output,
        {name: tensor.to(dtype) for name, tensor in tensors.items()},
        {"format": "pt"},
    )
    print(f"{chosen.output}: {sum(tensor.numel() for tensor in tensors.values()):,} random numbers")


if __name__ == "__main__":
    run(main)
