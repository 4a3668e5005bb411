"""Options of output: saves, states, sample images, metadata, trackers, uploads. Torch-free."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from library.errors import Mistake
from library.generation.samplers import SAMPLERS
from library.options import OptionGroup, option


@dataclass(frozen=True)
class SavingOptions(OptionGroup, affects_result=False):
    """Saving."""

    output_dir: Path | None = option(None, "folder for all output files", private=True)
    output_name: str | None = option(
        None, "name of the saved files, without suffix; unset: last, epoch-… and at-step…"
    )
    save_precision: str | None = option(
        None,
        "dtype of saved weights; unset: that of the trained weights",
        choices=("float", "fp16", "bf16"),
    )
    save_every_n_epochs: int | None = option(
        None, "save after every N epochs, except the last one", at_least=0
    )
    save_every_n_steps: int | None = option(None, "save after every N optimizer steps", at_least=0)
    save_n_epoch_ratio: int | None = option(
        None,
        "save about N times, after complete epochs; wins over --save_every_n_epochs",
        at_least=0,
    )
    save_last_n_epochs: int | None = option(None, "keep only the newest N epoch saves", at_least=0)
    save_last_n_steps: int | None = option(
        None, "remove step saves that are more than N steps old", at_least=0
    )

    emergency_dir: Path | None = option(
        None, "folder to save to when --output_dir can't be written anymore", private=True
    )

    @property
    def name(self) -> str:
        """The name of the final file, without suffix."""
        return self.output_name or "last"

    def mistakes(self) -> Iterable[Mistake]:
        if self.output_dir is None:
            yield Mistake("--output_dir is missing: the folder to save in", ("output_dir",))
        if self.output_name is not None and not is_plain_name(self.output_name):
            yield Mistake(
                f"--output_name {self.output_name!r}: expected a plain file name, without folders "
                "and without its ending",
                ("output_name",),
            )
        elif self.output_name is not None and Path(self.output_name).suffix in (
            ".safetensors",
            ".ckpt",
            ".pt",
        ):
            yield Mistake(
                f"--output_name {self.output_name!r}: leave out the suffix, which "
                "--save_model_as decides",
                ("output_name",),
            )


@dataclass(frozen=True)
class ResumeOptions(OptionGroup, affects_result=False):
    """States, and resuming from them."""

    save_state: bool = option(False, "save a state with each saved model, and at the end")
    save_state_on_train_end: bool = option(False, "save a state at the end")
    save_last_n_epochs_state: int | None = option(
        None, "keep only the newest N epoch states; wins over --save_last_n_epochs", at_least=0
    )
    save_last_n_steps_state: int | None = option(
        None,
        "remove step states that are more than N steps old; wins over --save_last_n_steps",
        at_least=0,
    )
    resume: str | None = option(
        None,
        "state folder to resume from (bit-exact); latest: the newest complete state of "
        "--output_name",
        private=True,
    )
    auto_resume: bool = option(
        False,
        "resume from the newest complete state of --output_name, or start from scratch if there "
        "is none",
    )
    resume_anyway: bool = option(
        False, "resume although options or images differ from those of the state"
    )
    verify_resume: int | None = option(
        None,
        "replay N steps from the state and compare them with the step log; nothing is saved",
        at_least=1,
    )
    initial_epoch: int | None = option(
        None,
        "epoch to start in without a state, counted from 1; with --skip_until_initial_step",
        at_least=1,
    )
    initial_step: int | None = option(
        None,
        "number of optimizer steps to skip without a state; with --skip_until_initial_step",
        at_least=0,
    )
    skip_until_initial_step: bool = option(
        False,
        "skip the images before --initial_step or --initial_epoch; states do so by themselves",
    )

    @property
    def saves_states(self) -> bool:
        return self.save_state or self.save_state_on_train_end

    def mistakes(self) -> Iterable[Mistake]:
        if self.resume and self.auto_resume:
            yield Mistake("--resume and --auto_resume: give one of them", ("resume", "auto_resume"))
        starts = [
            name for name in ("initial_epoch", "initial_step") if getattr(self, name) is not None
        ]
        if len(starts) == 2:
            yield Mistake(
                "--initial_epoch and --initial_step: give one of them",
                ("initial_epoch", "initial_step"),
            )
        if starts and not self.skip_until_initial_step:
            yield Mistake(
                f"--{starts[0]} needs --skip_until_initial_step: without it, sd-scripts only "
                "numbers epochs otherwise",
                (starts[0],),
            )
        if starts and (self.resume or self.auto_resume):
            yield Mistake(
                f"--{starts[0]}: it can't be combined with a state, which already stores the step; "
                "leave it out",
                (starts[0],),
            )
        if self.verify_resume and not self.resume:
            yield Mistake(
                "--verify_resume needs --resume, the state to replay from",
                ("verify_resume", "resume"),
            )


_WINDOWS_DEVICES = {
    "con",
    "prn",
    "aux",
    "nul",
    *(f"{port}{n}" for port in ("com", "lpt") for n in range(10)),
}


def is_plain_name(name: str) -> bool:
    """Return whether a name without suffix names a file in its folder, on every system."""
    is_device = name.split(".")[0].lower() in _WINDOWS_DEVICES
    fits = not set(name) & set('/\\:*?"<>|') and name.isprintable() and len(name.encode()) <= 200
    return (
        fits
        and name == name.strip()
        and not name.startswith(("-", "."))
        and name != ""
        and not is_device
    )


@dataclass(frozen=True)
class PreviewOptions(OptionGroup, affects_result=False):
    """Sample images during training (OUTPUT_DIR/sample)."""

    sample_prompts: Path | None = option(
        None, "file of prompts: .txt with one per line, .toml or .json", private=True
    )
    sample_every_n_steps: int | None = option(
        None, "generate sample images every N optimizer steps", at_least=1, unset=(0, -1)
    )
    sample_every_n_epochs: int | None = option(
        None,
        "generate sample images every N epochs; wins over --sample_every_n_steps",
        at_least=1,
        unset=(0, -1),
    )
    sample_at_first: bool = option(False, "generate sample images before the first step too")
    sample_sampler: str = option(
        "ddim", "sampler of prompts that don't name one", choices=tuple(SAMPLERS)
    )

    @property
    def is_on(self) -> bool:
        return bool(self.sample_every_n_steps or self.sample_every_n_epochs or self.sample_at_first)

    def mistakes(self) -> Iterable[Mistake]:
        if self.is_on and self.sample_prompts is None:
            yield Mistake(
                "samples during training need --sample_prompts, the file of prompts",
                ("sample_prompts",),
            )
        if self.is_on and self.sample_prompts is not None and not self.sample_prompts.is_file():
            yield Mistake(
                f"--sample_prompts {self.sample_prompts}: no such file", ("sample_prompts",)
            )


@dataclass(frozen=True)
class TrackerOptions(OptionGroup, affects_result=False):
    """Trackers."""

    logging_dir: Path | None = option(
        None, "folder of the TensorBoard logs; implies --log_with tensorboard", private=True
    )
    log_with: str | None = option(
        None,
        "where to send losses, learning rates and sample images",
        choices=("tensorboard", "wandb", "all"),
    )
    log_prefix: str | None = option(None, "prefix of the run folder's name")
    log_tracker_name: str | None = option(
        None, "folder within the run folder, and project at wandb; network_train when unset"
    )
    wandb_run_name: str | None = option(None, "name of the run at wandb")
    log_tracker_config: Path | None = option(
        None,
        "TOML file with a table for each tracker: arguments of its start; wins over "
        "--wandb_run_name",
        private=True,
    )
    wandb_api_key: str | None = option(
        None,
        "key for wandb; the variable WANDB_API_KEY keeps it out of the command line",
        secret=True,
    )
    log_config: bool = option(False, "send the options too, without keys, paths and file names")

    @property
    def names(self) -> tuple[str, ...]:
        """The trackers asked for."""
        if self.log_with is None:
            return () if self.logging_dir is None else ("tensorboard",)
        return ("tensorboard", "wandb") if self.log_with == "all" else (self.log_with,)

    def mistakes(self) -> Iterable[Mistake]:
        if "tensorboard" in self.names and self.logging_dir is None:
            yield Mistake(f"--log_with {self.log_with} needs --logging_dir", ("logging_dir",))
        if self.log_tracker_config is not None and not self.log_tracker_config.is_file():
            yield Mistake(
                f"--log_tracker_config {self.log_tracker_config}: no such file",
                ("log_tracker_config",),
            )


@dataclass(frozen=True)
class UploadOptions(OptionGroup, affects_result=False):
    """Upload to the Hugging Face hub."""

    huggingface_repo_id: str | None = option(
        None, "repository to which every saved file is uploaded; created if it doesn't exist"
    )
    huggingface_repo_type: str | None = option(
        None, "type of the repository; model when unset", choices=("model", "dataset", "space")
    )
    huggingface_path_in_repo: str | None = option(None, "folder within the repository")
    huggingface_token: str | None = option(
        None,
        "token; the variable HF_TOKEN or hf auth login keep it out of the command line",
        secret=True,
    )
    huggingface_repo_visibility: str | None = option(
        None, "visibility of a repository that is created: public, or anything else for private"
    )
    save_state_to_huggingface: bool = option(False, "upload saved states too; with --save_state")
    resume_from_huggingface: bool = option(
        False,
        "--resume names a state on the hub: OWNER/REPOSITORY/FOLDER, optionally followed by "
        ":REVISION:TYPE",
    )
    async_upload: bool = option(
        False,
        "",
        no_effect="files are always uploaded in the background, and waited for at the end",
    )


@dataclass(frozen=True)
class MetadataOptions(OptionGroup, affects_result=False):
    """Metadata of the saved file (modelspec)."""

    metadata_title: str | None = option(None, "title; unset: --output_name")
    metadata_author: str | None = option(None, "author")
    metadata_description: str | None = option(None, "description")
    metadata_license: str | None = option(None, "license")
    metadata_tags: str | None = option(None, "tags, separated by commas")
    metadata_usage_hint: str | None = option(None, "how to use it")
    metadata_thumbnail: str | None = option(None, "an image file, or a data: URL", private=True)
    metadata_merged_from: str | None = option(None, "models that it was merged from")
    metadata_trigger_phrase: str | None = option(None, "words in a prompt that trigger it")
    metadata_preprocessor: str | None = option(None, "preprocessor of control images")
    metadata_is_negative_embedding: str | None = option(
        None, "whether it belongs in negative prompts"
    )
