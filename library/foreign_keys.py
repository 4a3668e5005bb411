"""Keys of config files that the script at hand doesn't have, but that are known: what each one is.

One file often serves several scripts, and GUIs write keys of their own into it. Such a key gives a warning, whereas an unknown
key that is close to an option is a mistake. Keys of the script at hand are never looked up here.
"""

import importlib
from functools import cache

from library.option_types import specs_of

_SCRIPTS = ("sdxl_train_network", "sdxl_train", "sdxl_train_textual_inversion", "sdxl_train_control_net_lllite", "sdxl_gen_img")  # fmt: skip

# Written by GUIs for their own use, or for scripts that are no SDXL scripts.
_GUI = (
    "epoch max_resolution noise_offset_type sdxl sdxl_cache_text_encoder_outputs sdxl_no_half_vae"
    " flux1_checkbox sd3_checkbox LoRA_type additional_parameters num_machines num_processes num_cpu_threads_per_process"
    " dynamo_use_dynamic dynamo_use_fullgraph dynamo_mode extra_accelerate_launch_args main_process_port multi_gpu gpu_ids"
    " t5xxl clip_l ae guidance_scale discrete_flow_shift model_prediction_type sigmoid_scale"
    " weighting_scheme blocks_to_swap apply_t5_attn_mask t5xxl_max_token_length"
    " controlnet_model_name_or_path model_type"
)


def foreign_key(name: str) -> str | None:
    """What a key is that the script at hand doesn't know; None if nothing here knows it either."""
    if name in _GUI.split():
        return "written by a GUI or for another model"
    return _options_of_scripts().get(name)


@cache
def _options_of_scripts() -> dict[str, str]:
    """Every option of every script, and the first script that has it. Imports the scripts, but not torch: it takes 0.1 s."""
    owners: dict[str, str] = {}
    for script in _SCRIPTS:
        for group in importlib.import_module(script).OPTIONS:
            for spec in specs_of(group):
                owners.setdefault(spec.name, f"an option of {script}.py")
    return owners
