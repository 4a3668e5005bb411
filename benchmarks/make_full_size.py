"""Make a random SDXL checkpoint of full size (6.9 GB in float16), for benchmarks that need real sizes and no real weights.

python benchmarks/make_full_size.py --output /tmp/sdxl_random_fp16.safetensors
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library.errors import run
from library.options import OptionGroup, option, read_options


@dataclass(frozen=True)
class FullSizeOptions(OptionGroup):
    """The model"""

    output: Path = option(Path("sdxl_random_fp16.safetensors"), "file to write")
    precision: str = option("fp16", "dtype of the weights", choices=("float", "fp16", "bf16"))
    seed: int = option(0, "seed of the weights")


def main(argv: list[str] | None = None) -> None:
    chosen = read_options(__doc__, [FullSizeOptions], argv)[FullSizeOptions]
    from library.device import DTYPES
    from library.safetensors_io import write_safetensors
    from tools.tiny_models import FULL, random_checkpoint

    write_safetensors(
        chosen.output,
        random_checkpoint(FULL, chosen.seed, DTYPES[chosen.precision]),
        {"format": "pt"},
    )
    print(f"{chosen.output}: {chosen.output.stat().st_size / 1e9:.2f} GB")


if __name__ == "__main__":
    run(main)
