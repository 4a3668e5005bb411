"""Generate images with SDXL: from prompts, from images, with networks and control nets.

python sdxl_gen_img.py --ckpt model.safetensors --prompt "a cat --w 832 --h 1216"
"""

import sys

from library.errors import run
from library.generation.generate import check_generation, generate
from library.generation.metadata import with_stored_arguments
from library.generation.options import GENERATION, InitImageOptions
from library.log import LogOptions, start_logging
from library.options import read_options
from networks.inference.options import AppliedNetworkOptions

OPTIONS = [*GENERATION, AppliedNetworkOptions, LogOptions]


def main(argv: list[str] | None = None) -> None:
    arguments = with_stored_arguments(sys.argv[1:] if argv is None else argv)
    options = read_options(__doc__, OPTIONS, arguments, checks=[check_generation])
    start_logging(options)
    networks = options[AppliedNetworkOptions]

    def load_adapters(models):  # noqa: ANN001, ANN202 - their types would import torch
        from networks.inference.adapters import AppliedNetworks

        is_regional = options[InitImageOptions].mask_path is not None
        return AppliedNetworks(networks, models, is_regional=is_regional)

    generate(
        options,
        load_adapters,
        num_networks=len(networks.network_weights or ()),
        num_unmerged=networks.num_unmerged,
        num_control_nets=len(networks.control_net_lllite_models or ()),
    )


if __name__ == "__main__":
    run(main)
