"""Fill caches without training: what tools/cache_latents.py and tools/cache_text_encoder_outputs.py share.

The options are those of training, so a run's config file says what to cache.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from library.data.dataset_config import DatasetDefinition
from library.data.options import DATA_OPTIONS, CacheOptions, CaptionOptions, DatasetOptions
from library.errors import Mistake
from library.log import LogOptions
from library.models.options import ModelOptions
from library.option_types import specs_of
from library.options import OptionGroup, Options, option, read_options
from library.training.options.compatibility import COMMON_TRAINING, NO_EFFECT, UNSUPPORTED
from networks.options import NetworkOptions


@dataclass(frozen=True)
class ToolOptions(OptionGroup):
    """Caching."""

    mixed_precision: str = option(
        "no", "dtype in which the models compute", choices=("no", "fp16", "bf16")
    )
    seed: int | None = option(
        None, "chooses the images that validation_split holds out", at_least=0
    )
    skip_existing: bool = option(
        False,
        "old switch",
        no_effect="valid cache files are always kept, and only the missing ones are made",
    )
    sdxl: bool = option(False, "the model is an SDXL model", no_effect="it always is")


GROUPS = (ToolOptions, ModelOptions, *DATA_OPTIONS, LogOptions)

_FLUX = (
    "weighting_scheme logit_mean logit_std mode_scale blocks_to_swap clip_l t5xxl ae controlnet_model_name_or_path"
    " t5xxl_max_token_length apply_t5_attn_mask guidance_scale timestep_sampling sigmoid_scale model_prediction_type"
    " discrete_flow_shift model_type t5xxl_dtype text_encoder_batch_size"
)


def unused_options() -> dict[str, str]:
    """Return the options of training scripts, and of other models, that a config file may hold, with the reason to ignore them."""
    ours = {spec.name for group in GROUPS for spec in specs_of(group)}
    theirs = [spec.name for group in (*COMMON_TRAINING, NetworkOptions) for spec in specs_of(group)]
    ours.add("dataset_class")
    unused = {
        name: "it is for training"
        for name in [*theirs, *UNSUPPORTED, *NO_EFFECT]
        if name not in ours
    }
    return unused | dict.fromkeys(_FLUX.split(), "it is for FLUX")


def read_tool_options(
    description: str, argv: list[str] | None, **cache: Any
) -> tuple[Options, DatasetDefinition]:
    """Return the options of a caching tool, and the dataset definition.

    Args:
        description: the tool's docstring.
        argv: the words of the command line.
        **cache: the cache options that the tool stands for.
    """
    if not cache.get("cache_text_encoder_outputs"):
        cache["text_cache_variants"] = None  # which a run's config file may set

    def with_cache(options: Options) -> Options:
        return options.replaced(dataclasses.replace(options[CacheOptions], **cache))

    definition = DatasetDefinition("unused")
    options = read_options(
        description,
        GROUPS,
        argv,
        checks=[
            lambda options: definition.check(with_cache(options)),
            lambda options: _check_tool(options[DatasetOptions]),
        ],
        refused={"flux": "this tool is for SDXL", "dataset_class": UNSUPPORTED["dataset_class"]},
        unused=unused_options(),
    )
    return with_cache(options), definition


def _check_tool(options: DatasetOptions) -> Iterator[Mistake]:
    if options.debug_dataset:
        yield Mistake(
            "--debug_dataset is for the training scripts; give it to the run that the caches are for"
        )


def fill(options: Options, definition: DatasetDefinition) -> None:
    """Fill the caches that the options ask for, on all processes.

    Args:
        options: the options of the tool.
        definition: the dataset definition, parsed.

    Raises:
        RunError: images can't be used.
    """
    from library.training.setup.inputs import open_model, scan_datasets

    chosen, cache, data = options[ToolOptions], options[CacheOptions], options[DatasetOptions]
    checkpoint = open_model(options[ModelOptions], prefer_fp16=chosen.mixed_precision == "fp16")
    datasets, file_index = scan_datasets(definition, data, cache.cache_dir, seed=chosen.seed)

    from library.device import Precision
    from library.log import log
    from library.models.sdxl import SdxlModels
    from library.training.distributed.launch import start_processes
    from library.training.setup.caches import fill_dataset_caches

    accelerator = start_processes()
    model = options[ModelOptions]
    models = SdxlModels(
        checkpoint,
        Precision.decide(chosen.mixed_precision, None, no_half_vae=model.no_half_vae),
        accelerator.device,
        vae=model.vae,
        tokenizer_folder=model.tokenizer_cache_dir,
    )
    cached = fill_dataset_caches(
        datasets,
        models,
        cache,
        accelerator,
        file_index,
        num_tokens=model.num_tokens,
        weighted_captions=options[CaptionOptions].weighted_captions,
        skip_bad_images=data.skip_bad_images,
        audits=False,
    )
    log.info(
        "done: the caches of %d images are complete",
        sum(len(dataset.samples) for dataset in cached.datasets),
    )
    accelerator.end_training()
