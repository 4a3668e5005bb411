"""Checkpoint: an SDXL model on disk, opened, identified, and read component by component.

Single files (.safetensors; .ckpt and other pickles by torch's weights_only loader), Diffusers folders and hub ids.
Opening reads headers only, and imports torch for pickles only, so a wrong file is reported at once. The files stay open:
replacing one on disk can't change what a later save copies from it.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from library.errors import OptionError, RunError, first_line
from library.hub import hub_errors, hub_files
from library.models.checkpoint import layouts
from library.models.checkpoint.key_maps import FILE_PREFIXES, FOLDERS, PARTS, REFINER_PREFIXES
from library.models.unet_config import UNetConfig
from library.safetensors_io import TensorFile

if TYPE_CHECKING:
    import torch


class OpenTensors(Protocol):
    """A file of tensors, open for reading."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...
    @property
    def metadata(self) -> Mapping[str, str]: ...
    def __getitem__(self, name: str) -> "torch.Tensor": ...


@dataclass(frozen=True)
class Checkpoint:
    """An opened SDXL checkpoint.

    Attributes:
        path: the single file or the folder.
        is_folder: a Diffusers folder, as opposed to a single file.
        unet: the U-Net's sizes.
        v_prediction, zero_terminal_snr: what the checkpoint says of itself; None where it says nothing.
        said_by: what says so, for messages.
    """

    path: Path
    is_folder: bool
    unet: UNetConfig
    v_prediction: bool | None
    zero_terminal_snr: bool | None
    said_by: str
    _stored: Mapping[
        str, Mapping[str, tuple[OpenTensors, str]]
    ]  # part -> stored name without prefix -> file, key

    @property
    def parts(self) -> list[str]:
        return [part for part in PARTS if self._stored[part]]

    @property
    def prefixes(self) -> Mapping[str, str]:
        """What the names of each part's tensors begin with in single files of this model."""
        return FILE_PREFIXES if "text_encoder_1" in self.parts else REFINER_PREFIXES

    def describe(self) -> str:
        """The model in one line."""
        kind = "Diffusers folder" if self.is_folder else "single file"
        said = {
            True: f"v-prediction (by {self.said_by})",
            False: f"noise prediction (by {self.said_by})",
            None: "noise prediction unless told",
        }
        zero = ", zero terminal SNR" if self.zero_terminal_snr else ""
        return f"{self.path.name}: {self.unet.family}, {kind}, {said[self.v_prediction]}{zero}"

    def tensors(self, part: str) -> dict[str, "torch.Tensor"]:
        """The part's tensors under module names (key_maps.py), as stored: mapped, not cast."""
        stored = self._raw(part)
        convert = layouts.module_from_folder if self.is_folder else layouts.module_from_file
        return convert(part, stored)

    def file_tensors(self, part: str) -> Mapping[str, "torch.Tensor"]:
        """What a single file keeps of the part, without prefix; of a single file, its very tensors."""
        if self.is_folder:
            return layouts.file_from_module(part, self.tensors(part))
        return {
            name: tensor
            for name, tensor in self._raw(part).items()
            if not name.endswith(layouts.DROPPED)
        }

    def _raw(self, part: str) -> dict[str, "torch.Tensor"]:
        return {name: file[key] for name, (file, key) in self._stored[part].items()}


def open_checkpoint(name: str, *, mapped: bool = True, prefer_fp16: bool = False) -> Checkpoint:
    """Open a single file, a Diffusers folder or a hub id.

    Args:
        mapped: map safetensors files into memory instead of reading them (--disable_mmap_load_safetensors turns it off).
        prefer_fp16: of a folder with both, take the fp16 variant.

    Raises:
        OptionError: it is not an SDXL model; the message is one line.
        RunError: the file is damaged.
    """
    path = _locate(name, prefer_fp16=prefer_fp16)
    if path.is_dir():
        return _open_folder(path, mapped=mapped, prefer_fp16=prefer_fp16)
    return _open_file(path, mapped=mapped)


# -------------------------------------------------------------------------------------------------------- single files


def _open_file(path: Path, *, mapped: bool) -> Checkpoint:
    file = open_tensors(path, mapped=mapped)
    names = file.shapes
    if not all(any(name.startswith(prefix) for name in names) for prefix in _SDXL_SIGNATURE):
        raise OptionError(f"{path}: this is {identify(names)}; an SDXL checkpoint is needed")
    has_first = any(name.startswith(FILE_PREFIXES["text_encoder_1"]) for name in names)
    stored = {
        part: {name.removeprefix(prefix): (file, name) for name in names if name.startswith(prefix)}
        for part, prefix in (FILE_PREFIXES if has_first else REFINER_PREFIXES).items()
    }
    shapes = {name: names[key] for name, (_, key) in stored["unet"].items()}
    says_v, says_zero = "v_pred" in names, "ztsnr" in names
    return Checkpoint(
        path=path,
        is_folder=False,
        unet=_unet_config(path, shapes),
        v_prediction=True if says_v else None,
        zero_terminal_snr=True if says_zero else None,
        said_by=" and ".join(["its key v_pred"] * says_v + ["its key ztsnr"] * says_zero),
        _stored=stored,
    )


def _unet_config(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> UNetConfig:
    try:
        return UNetConfig.from_shapes(shapes)
    except (KeyError, StopIteration) as error:
        raise RunError(
            f"{path}: the U-Net lacks {error}: the file is damaged or no SDXL checkpoint"
        ) from None


_SDXL_SIGNATURE = (
    "model.diffusion_model.input_blocks.",
    "model.diffusion_model.label_emb.",
    "conditioner.embedders.",
)

# What else a user may have picked: (a prefix or piece of a key, what the file is); the first that is found counts.
_SIGNATURES = (
    (".hada_w1_a", "a LoHa"),
    (".lokr_w1", "a LoKr"),
    (".oft_", "an OFT network"),
    ("lora_unet_", "a LoRA (give it to --network_weights)"),
    ("lora_te", "a LoRA (give it to --network_weights)"),
    (".lora_A.", "a LoRA (give it to --network_weights)"),
    ("lllite_unet", "a ControlNet-LLLite"),
    ("control_model.", "a ControlNet"),
    ("controlnet_", "a ControlNet"),
    ("double_blocks.", "a Flux checkpoint"),
    ("joint_blocks.", "an SD 3 checkpoint"),
    ("cond_stage_model.model.", "an SD 2.x checkpoint"),
    ("cond_stage_model.", "an SD 1.x checkpoint"),
    ("down_blocks.0.resnets", "a Diffusers U-Net file (give its folder's parent)"),
    ("model.diffusion_model.input_blocks.", "a U-Net alone, without text encoders and VAE"),
    ("input_blocks.", "a U-Net alone, without text encoders and VAE"),
    ("first_stage_model.", "a VAE (give it to --vae)"),
    ("decoder.", "a VAE (give it to --vae)"),
    ("clip_g", "a Textual Inversion embedding"),
    ("text_model.", "a text encoder alone"),
)


def identify(names: Iterable[str]) -> str:
    """What a file is by its keys, in words."""
    names = list(names)
    for piece, what in _SIGNATURES:
        if any(piece in name for name in names):
            return what
    return "no checkpoint that is known here" if names else "a file without tensors"


# ----------------------------------------------------------------------------------------------------------- Diffusers


def _open_folder(path: Path, *, mapped: bool, prefer_fp16: bool) -> Checkpoint:
    index = _read_json(path / "model_index.json")
    pipeline = index.get("_class_name", "no pipeline")
    if not str(pipeline).startswith("StableDiffusionXL"):
        raise OptionError(
            f"{path}: this folder holds {pipeline}; a StableDiffusionXL pipeline is needed"
        )
    stored: dict[str, dict[str, tuple[OpenTensors, str]]] = {}
    for part, folder in FOLDERS.items():
        if index.get(folder) == [None, None]:  # the refiner's first text encoder
            stored[part] = {}
            continue
        files = [
            open_tensors(file, mapped=mapped)
            for file in _component_files(path / folder, prefer_fp16=prefer_fp16)
        ]
        stored[part] = {name: (file, name) for file in files for name in file.shapes}
    rename = layouts.unet_name_from_folder(stored["unet"])
    shapes = {rename(name): file.shapes[key] for name, (file, key) in stored["unet"].items()}
    scheduler = _read_json(path / "scheduler" / "scheduler_config.json")
    prediction = scheduler.get("prediction_type")
    return Checkpoint(
        path=path,
        is_folder=True,
        unet=_unet_config(path, shapes),
        v_prediction=None if prediction is None else prediction == "v_prediction",
        zero_terminal_snr=scheduler.get("rescale_betas_zero_snr"),
        said_by="its scheduler_config.json",
        _stored=stored,
    )


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: can't be read as JSON: {error}") from None


def choose_weights(names: Iterable[str], *, prefer_fp16: bool) -> list[str]:
    """Of a component's file names, those with its weights: the wanted variant, then the other; safetensors before pickles."""
    names = sorted(names)
    for variant in (r"\.fp16", "") if prefer_fp16 else ("", r"\.fp16"):
        for stem in (
            r"(diffusion_pytorch_model|model){}(-\d+-of-\d+)?\.safetensors",
            r"(diffusion_pytorch_model|pytorch_model){}(-\d+-of-\d+)?\.bin",
        ):
            if chosen := [name for name in names if re.fullmatch(stem.format(variant), name)]:
                return chosen
    return []


def _component_files(folder: Path, *, prefer_fp16: bool) -> list[Path]:
    chosen = choose_weights((file.name for file in folder.glob("*")), prefer_fp16=prefer_fp16)
    if not chosen:
        raise RunError(
            f"{folder}: no weights here; expected diffusion_pytorch_model.safetensors or model.safetensors"
        )
    return [folder / name for name in chosen]


# --------------------------------------------------------------------------------------------------------------- files


def open_tensors(path: Path, *, mapped: bool = True) -> OpenTensors:
    """Open a file of tensors, whatever its format: safetensors by its content, else a pickle."""
    with open(path, "rb") as file:
        start = file.read(2)
    is_pickle = start in (b"PK", b"\x80\x02") and path.suffix != ".safetensors"
    return (
        _PickledTensors(path, mapped=mapped and start == b"PK")
        if is_pickle
        else TensorFile(path, mapped=mapped)
    )


class _PickledTensors:
    """The tensors of a .ckpt, .pt or .bin file; nothing but tensors and plain values is ever unpickled."""

    def __init__(self, path: Path, *, mapped: bool):
        import pickle

        import torch

        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        except pickle.UnpicklingError as error:
            # Torch's own text advises how to load it all the same, which we never pass on.
            found = re.search(r"GLOBAL ([\w.]+)", str(error))
            what = f": {found[1]}" if found else ""
            raise RunError(
                f"{path}: refused: it holds more than tensors, which could run code on loading{what}"
            ) from None
        except Exception as error:  # a damaged pickle raises whatever its bytes happen to say
            raise RunError(f"{path}: can't be read as a torch file: {first_line(error)}") from None
        loaded = loaded.get("state_dict", loaded) if isinstance(loaded, Mapping) else {}
        if not isinstance(loaded, Mapping):
            loaded = {}
        self._tensors = {
            name: value for name, value in loaded.items() if isinstance(value, torch.Tensor)
        }
        self.metadata: Mapping[str, str] = {}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def __getitem__(self, name: str) -> "torch.Tensor":
        return self._tensors[name]


def _locate(name: str, *, prefer_fp16: bool) -> Path:
    """A path on this machine: the one given, or the hub's local copy, downloaded if need be."""
    path = Path(name).expanduser()
    if path.exists():
        return path
    if not _looks_like_hub_id(name):
        raise OptionError(f"{name}: no such file or folder")
    return _from_hub(name, prefer_fp16=prefer_fp16)


def check_vae(name: str) -> None:
    """See by its header that --vae names a VAE; pickles are only looked at when they are loaded. Raises OptionError."""
    path = locate_vae(name)
    if path.is_dir() or path.suffix != ".safetensors":
        return
    names = [key.removeprefix(FILE_PREFIXES["vae"]) for key in TensorFile(path).shapes]
    if not {"encoder.conv_in.weight", "decoder.conv_in.weight"} <= set(names):
        raise OptionError(f"--vae {path}: this is {identify(names)}; a VAE is needed")


def locate_vae(name: str) -> Path:
    """The file of a VAE, or the folder of a whole Diffusers model, that --vae names; a hub id is downloaded."""
    path = Path(name).expanduser()
    if path.is_file() or (path / "model_index.json").exists():
        return path
    if path.is_dir():
        return _component_files(path, prefer_fp16=False)[0]
    if not _looks_like_hub_id(name):
        raise OptionError(f"--vae {name}: no such file or folder")
    import huggingface_hub

    with hub_errors(f"--vae {name}"):
        there = hub_files(name)
        if "model_index.json" in there:
            return _from_hub(name, prefer_fp16=False)
        chosen = choose_weights(there, prefer_fp16=False)
        if not chosen:
            raise OptionError(f"--vae {name}: no VAE weights in this hub repository")
        return Path(huggingface_hub.hf_hub_download(name, chosen[0]))


def _looks_like_hub_id(name: str) -> bool:
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) is not None and Path(name).suffix not in (
        ".safetensors",
        ".ckpt",
        ".pt",
        ".bin",
    )


def _from_hub(repo_id: str, *, prefer_fp16: bool) -> Path:
    """Download (or find in the hub's cache) one variant of each component, its configurations and tokenizers.

    The client takes up a cut download where it broke, and a file has its name in the cache only when it is whole.
    """
    import huggingface_hub

    wanted = [
        "model_index.json",
        "scheduler/*",
        "tokenizer/*",
        "tokenizer_2/*",
        *(f"{folder}/*.json" for folder in FOLDERS.values()),
    ]
    with hub_errors(repo_id):
        there = hub_files(repo_id)
        for folder in FOLDERS.values():
            files = [
                name.removeprefix(f"{folder}/") for name in there if name.startswith(f"{folder}/")
            ]
            wanted += [
                f"{folder}/{name}" for name in choose_weights(files, prefer_fp16=prefer_fp16)
            ]
        return Path(huggingface_hub.snapshot_download(repo_id, allow_patterns=wanted))
