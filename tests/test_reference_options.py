"""Every option of the reference's scripts: here, refused with a reason, or told that it changes nothing. None is forgotten.

reference_options.tsv has name, type, default and choices of each, by script. What differs is listed in one place, below.
"""

import csv
from collections.abc import Iterable
from pathlib import Path

import pytest

from library.generation.options import GENERATION
from library.log import LogOptions
from library.option_types import Spec, specs_of
from library.options import ConfigOptions
from library.training.options.compatibility import COMMON_TRAINING, NO_EFFECT, UNSUPPORTED
from library.training.options.tasks import (
    EmbeddingOptions,
    FineTuneOptions,
    LLLiteOptions,
    PivotalOptions,
)
from library.training.setup import cache_tool as caching
from networks.inference.options import AppliedNetworkOptions
from networks.options import NetworkOptions

ROWS = list(
    csv.DictReader(
        (Path(__file__).parent / "reference_options.tsv").open(encoding="utf-8"), delimiter="\t"
    )
)

# option -> what differs, and why.
CHOICES = {
    "resize_interpolation": "box, which the dataset file has, is an option too",
    "lr_scheduler": "any text there, which fails late; here the names that work",
    "sample_sampler": "Karras' noise levels, and uni_pc, lcm and the stochastic dpmsolver++, are choices too",
    "huggingface_repo_type": "any text there, which fails when the first file is sent",
}
OWN = {
    "aesthetic_score",
    "allow_missing_captions",
    "allow_partial",
    "auto_resume",
    "base_quant",
    "blocks_to_swap",
    "bundle_token",
    "cache_dir",
    "checkpoint_policy",
    "dry_run",
    "early_stop_patience",
    "ema_decay",
    "ema_device",
    "emergency_dir",
    "fused_clip",
    "lllite_blocks",
    "logit_mean",
    "logit_std",
    "mode_scale",
    "memory_plan",
    "optimizer_offload",
    "resume_anyway",
    "rounding",
    "save_best",
    "skip_bad_images",
    "stop_text_encoder_training",
    "strict_config",
    "text_cache_variants",
    "ti_stop_ratio",
    "timestep_sampling",
    "token_init_word",
    "token_lr",
    "token_vectors",
    "train_token",
    "verify_model",
    "verify_resume",
}


def rows_of(script: str) -> dict[str, dict[str, str]]:
    return {row["option"]: row for row in ROWS if script in row["scripts"].split(",")}


def specs_in(groups: Iterable[type]) -> dict[str, Spec]:
    return {spec.name: spec for group in groups for spec in specs_of(group)}


SCRIPTS = {
    "network": specs_in((ConfigOptions, NetworkOptions, PivotalOptions, *COMMON_TRAINING)),
    "ti": specs_in((ConfigOptions, EmbeddingOptions, *COMMON_TRAINING)),
    "train": specs_in((ConfigOptions, FineTuneOptions, *COMMON_TRAINING)),
    "lllite": specs_in((ConfigOptions, LLLiteOptions, *COMMON_TRAINING)),
}
EACH = [
    (script, name) for script, specs in SCRIPTS.items() for name in rows_of(script) if name in specs
]


@pytest.mark.parametrize("script, name", EACH)
def test_type_default_and_choices_are_the_references(script, name):
    row, spec = rows_of(script)[name], SCRIPTS[script][name]
    kinds = {"Path": "str"}
    types = (
        "int_or_float"
        if spec.kinds == (int, float)
        else kinds.get(spec.kinds[0].__name__, spec.kinds[0].__name__)
    )
    assert types == kinds.get(row["type"], row["type"])
    default = (
        {"1": "1.0"}.get(row["default"], row["default"])
        if spec.kinds == (float,)
        else row["default"]
    )
    assert str(spec.default) in (default, row["default"])
    choices = spec.rules["choices"]
    wanted = None if row["choices"] == "-" else set(row["choices"].split(",")) - {"None"}
    if name in CHOICES:
        assert choices and set(choices) != wanted, f"{name} is listed as different, and isn't"
    else:
        assert (None if choices is None else set(map(str, choices))) == wanted


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_training_script_forgets_an_option(script):
    known = set(SCRIPTS[script])
    assert set(rows_of(script)) - known - set(UNSUPPORTED) - set(NO_EFFECT) == set()
    assert not known & (set(UNSUPPORTED) | set(NO_EFFECT)), "an option can't be there and refused"


def test_what_the_reference_has_in_no_training_script_is_listed():
    reference = {name for script in SCRIPTS for name in rows_of(script)}
    assert {name for specs in SCRIPTS.values() for name in specs if name not in reference} == OWN


def test_options_of_the_network_scripts_that_users_files_carry_hold_for_fine_tuning_too():
    assert {
        "prior_loss_weight",
        "stop_text_encoder_training",
        "validation_split",
        "save_best",
    } <= set(SCRIPTS["train"])


GENERATE = specs_in((ConfigOptions, *GENERATION, AppliedNetworkOptions, LogOptions))
GENERATE_OWN = {
    *("allow_partial", "clip_vision_model", "compile", "contact_sheet", "dry_run", "from_png", "guidance_rescale"),
    *("image_format", "prompt2", "v_parameterization", "vae_tiling", "zero_terminal_snr"),
    *("config_file", "output_config", "strict_config"),
}  # fmt: skip
MORE_CHOICES = {
    "sampler"
}  # in addition to the reference's: Karras' noise levels, uni_pc, lcm, the stochastic dpmsolver++


@pytest.mark.parametrize("name", rows_of("gen"))
def test_sdxl_gen_imgs_options_are_the_references(name):
    row, spec = rows_of("gen")[name], GENERATE[name]
    assert {"Path": "str"}.get(spec.kinds[0].__name__, spec.kinds[0].__name__) == row["type"]
    assert str(spec.default) == row["default"]
    choices = spec.rules["choices"]
    wanted = None if row["choices"] == "-" else set(row["choices"].split(","))
    assert (
        (wanted < set(choices))
        if name in MORE_CHOICES
        else (None if choices is None else set(choices)) == wanted
    )


def test_sdxl_gen_img_has_few_options_of_its_own():
    assert set(GENERATE) - set(rows_of("gen")) == GENERATE_OWN


@pytest.mark.parametrize("script", ["cache_latents", "cache_text"])
def test_the_caching_tools_forget_no_option(script):
    known = (
        set(specs_in((ConfigOptions, *caching.GROUPS)))
        | set(caching.unused_options())
        | {"flux", "dataset_class"}
    )
    assert set(rows_of(script)) - known == set()
