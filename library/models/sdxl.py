"""SdxlModels: the live U-Net, VAE, text encoders and tokenizers of one checkpoint, each loaded when first asked for."""

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from library.device import Precision, to_device
from library.errors import RunError
from library.log import log
from library.models.attention import AttentionFunction, sdpa
from library.models.checkpoint import layouts
from library.models.checkpoint.key_maps import FILE_PREFIXES, FOLDERS
from library.models.checkpoint.reader import Checkpoint, locate_vae, open_checkpoint, open_tensors
from library.models.memory.activation_checkpointing import KEPT, ActivationPolicy
from library.models.memory.block_swap import BlockSwapper, largest_blocks
from library.models.memory.quantization import quantize
from library.models.unet import UNet
from library.offload import OffloadStream

if TYPE_CHECKING:
    from diffusers import AutoencoderKL
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    from library.models.text_encoders import EncodedText
    from library.models.tokenizer import Tokenizer


_MAX_CUT_WARNINGS = 5
_LOADED = ("unet", "vae", "text_encoders", "_outlines", "tokenizers")


class WeightPatch(Protocol):
    """What is done to weights when they are loaded."""

    def text_identity(self) -> str:
        """Return what identifies the changed text encoders; "" if they aren't changed."""
        ...

    def apply(self, part: str, module: Any) -> None:
        """Change a loaded part: "unet", "text_encoder_1" or "text_encoder_2"."""
        ...


class SdxlModels:
    """The modules of a checkpoint: frozen, in eval mode, in the run's dtypes, on `device`.

    What no one asks for is never read: with complete caches that is everything but the U-Net.

    Attributes:
        change: what is done to weights when they are loaded; set before any is.
        trained: parts that are loaded in the dtype of trained weights; set before any is.
        swapped_blocks: how many of the U-Net's blocks lie in RAM (streaming.py); set before it is loaded.
        quantized: how the large layers of parts are kept (quantized.py), by part; set before any is loaded.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        precision: Precision,
        device: torch.device,
        *,
        vae: str | None = None,
        tokenizer_folder: Path | None = None,
        attention: AttentionFunction = sdpa,
        checkpointing: ActivationPolicy = KEPT,
    ):
        """Args: vae: a file, folder or hub id with another VAE. tokenizer_folder: --tokenizer_cache_dir."""
        self.checkpoint = checkpoint
        self.precision = precision
        self.device = device
        self._vae = vae
        self._tokenizer_folder = tokenizer_folder
        self._attention = attention
        self._checkpointing = checkpointing
        self.change: WeightPatch | None = None
        self._vae_changes: list[Callable[[AutoencoderKL], None]] = []
        self.trained: frozenset[str] = frozenset()
        self.quantized: Mapping[str, str] = {}
        self.swapped_blocks = 0
        self._cut: set[str] = set()

    @cached_property
    def unet(self) -> UNet:
        with torch.device("meta"):
            unet = UNet(self.checkpoint.unet, self._attention, self._checkpointing)
        what = f"{self.checkpoint.path}: U-Net"
        self._load(unet, "unet", self.checkpoint.tensors("unet"), what=what)
        return unet

    def _stream(self, unet: UNet) -> None:
        """Give the largest blocks their places in RAM, and the device what is left."""
        streamed = largest_blocks(unet.blocks, self.swapped_blocks)
        streamer = unet.activations.streamer = BlockSwapper(
            streamed, OffloadStream(torch.device("cpu"), self.device)
        )
        away = streamer.tensors
        for tensor in (*unet.parameters(), *unet.buffers()):
            if id(tensor) not in away:
                tensor.data = _placed(tensor.data, tensor.dtype, self.device)

    @cached_property
    def text_encoders(self) -> tuple["CLIPTextModel", "CLIPTextModelWithProjection"]:
        """Both; the refiner's first is an AbsentEncoder."""
        one, two = (self._text_encoder(number) for number in (1, 2))
        return one, two

    @property
    def text_layers(self) -> tuple[Any, Any]:
        """The text encoders as far as networks and optimizers look at them: without weights, outlines, which are made quickly."""
        return self._outlines if self.device.type == "meta" else self.text_encoders

    @cached_property
    def _outlines(self) -> tuple[Any, Any]:
        from library.models.text_encoders import NullTextEncoder, text_encoder_skeleton

        stored = (self.checkpoint.tensors(f"text_encoder_{number}") for number in (1, 2))
        one, two = (
            text_encoder_skeleton(tensors) if tensors else NullTextEncoder() for tensors in stored
        )
        return one, two

    def _text_encoder(self, number: int) -> Any:
        from library.models.text_encoders import NullTextEncoder, build_text_encoder, module_name

        tensors = self.checkpoint.tensors(f"text_encoder_{number}")
        if not tensors:
            return NullTextEncoder()
        encoder: Any = build_text_encoder(tensors, number)
        what = f"{self.checkpoint.path}: text encoder {number}"
        part = f"text_encoder_{number}"
        self._load(
            encoder, part, tensors, what=what, name_of=lambda name: module_name(encoder, name)
        )
        if self._checkpointing.policy is not None:
            # transformers renames it; version 6 will know the new name only.
            enable = getattr(
                encoder, "activation_checkpointing_enable", encoder.gradient_checkpointing_enable
            )
            enable({"use_reentrant": False})
        return encoder

    @cached_property
    def vae(self) -> "AutoencoderKL":
        return self._load_vae(self.precision.vae)

    def _load_vae(self, dtype: torch.dtype) -> "AutoencoderKL":
        vae = load_vae(
            self.stored("vae"), dtype, self.device, what=f"{self._vae or self.checkpoint.path}: VAE"
        )
        for change in self._vae_changes:
            change(vae)
        return vae

    def change_vae(self, change: Callable[["AutoencoderKL"], None]) -> None:
        """Change how the VAE works, now and when it is loaded again (in float32)."""
        self._vae_changes.append(change)
        if "vae" in self.__dict__:
            change(self.vae)

    def _vae_in_float32(self) -> "AutoencoderKL":
        """The VAE in float32, which takes the other's place: one image that overflows is seldom alone."""
        self.__dict__["vae"] = self._load_vae(torch.float32)
        return self.vae

    def encode_images(self, images: Tensor, noise: Tensor) -> Tensor:
        """Raw latents of images (library/models/vae.py: encode)."""
        from library.models.vae import encode

        return encode(self.vae, images, noise, self._vae_in_float32)

    def decode_latents(self, raw: Tensor, *, black: float | None = None) -> Tensor:
        """Images of raw latents (library/models/vae.py: decode)."""
        from library.models.vae import decode

        return decode(self.vae, raw, self._vae_in_float32, black=black)

    def _load(self, module: Any, part: str, tensors: Mapping[str, Tensor], *, what: str, name_of: Callable[[str], str] = lambda name: name) -> None:  # fmt: skip
        if self.device.type == "meta":
            module.requires_grad_(False).eval()
            return
        dtype = self.precision.trained if part in self.trained else self.precision.compute
        kind = self.quantized.get(part)
        is_streamed = part == "unet" and self.swapped_blocks > 0
        # The whole part may be larger than the device: before a layer is quantized, it stays in its file's pages.
        device = torch.device("cpu") if kind is not None or is_streamed else self.device
        load_weights(
            module, tensors, dtype if kind is None else None, device, what=what, name_of=name_of
        )
        if self.change is not None:
            self.change.apply(part, module)
        if kind is not None:
            quantize(module, kind, lambda weight: _placed(weight, dtype, self.device))
        if is_streamed:
            self._stream(module)

    def without_weights(self) -> "SdxlModels":
        """The same modules on the meta device, for building what goes on them without reading a weight."""
        skeleton = copy.copy(self)
        skeleton.__dict__ = {
            name: value for name, value in self.__dict__.items() if name not in _LOADED
        }
        skeleton.device = torch.device("meta")
        return skeleton

    @property
    def has_own_vae(self) -> bool:
        """Whether --vae names another VAE than the checkpoint's."""
        return self._vae is not None

    def stored(self, part: str) -> dict[str, Tensor]:
        """The part's tensors (module names) as stored, not cast: those that the modules are made of."""
        return (
            vae_tensors(self._vae)
            if part == "vae" and self._vae is not None
            else self.checkpoint.tensors(part)
        )

    def source(self, part: str) -> Path:
        """The file or folder that the part is read from."""
        if part == "vae" and self._vae is not None:
            return locate_vae(self._vae)
        return (
            self.checkpoint.path / FOLDERS[part]
            if self.checkpoint.is_folder
            else self.checkpoint.path
        )

    @cached_property
    def tokenizers(self) -> tuple["Tokenizer", "Tokenizer"]:
        from library.models.tokenizer import load_tokenizers

        return load_tokenizers(
            self._tokenizer_folder, self.checkpoint.path if self.checkpoint.is_folder else None
        )

    def encode_texts(
        self, texts: Sequence[str], num_tokens: int, *, weighted: bool = False
    ) -> "EncodedText":
        """Encode captions by both encoders, on their device and in their dtype; differentiable.

        Args:
            num_tokens: a multiple of 75, at which captions are cut.
            weighted: read (word:1.2) as weights.
        """
        from library.models import text_encoders
        from library.models import tokenizer as tokens

        one, two = (
            tokens.encode(tokenizer, texts, num_tokens, weighted=weighted)
            for tokenizer in self.tokenizers
        )
        self._warn_cut(one.cut, num_tokens)
        ids_one, ids_two = (to_device(part.ids, self.device) for part in (one, two))
        encoded = text_encoders.encode(ids_one, ids_two, *self.text_encoders)
        return (
            text_encoders.weigh(
                encoded, *(to_device(part.weights, self.device) for part in (one, two))
            )
            if weighted
            else encoded
        )

    def _warn_cut(self, cut: Sequence[tuple[str, str]], num_tokens: int) -> None:
        """Log captions that exceed the token limit, each once, and only a few."""
        for text, end in cut:
            if text in self._cut or len(self._cut) > _MAX_CUT_WARNINGS:
                continue
            self._cut.add(text)
            if len(self._cut) <= _MAX_CUT_WARNINGS:
                log.warning(
                    "caption exceeds %d tokens (--max_token_length); truncated: %r", num_tokens, end
                )
            else:
                log.warning("more captions are too long; --debug_dataset lists all of them")

    def release(self, *names: str) -> None:
        """Forget loaded modules ("vae", "text_encoders"): their memory is free, and asking again loads them again."""
        for name in names:
            self.__dict__.pop(name, None)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def load_vae(
    tensors: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device, *, what: str
) -> "AutoencoderKL":
    """The VAE of these tensors (module names), frozen. Raises RunError if they are no VAE's."""
    from library.models.vae import build_vae

    vae = build_vae(tensors)
    load_weights(vae, tensors, dtype, device, what=what)
    vae.encoder.to(memory_format=torch.channels_last)  # caching encodes; convolutions are faster so
    return vae


def load_weights(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype | None,
    device: torch.device,
    *,
    what: str,
    name_of: Callable[[str], str] = lambda name: name,
) -> None:
    """Give a module that was built on the meta device its weights, tensor by tensor, and freeze it in eval mode.

    A tensor that needs neither a cast nor a move uses the memory map of its file. On a GPU, casts happen there.

    Args:
        dtype: None: each tensor's own.
        name_of: the name in `tensors` of one of the module's own names.

    Raises RunError with counts and the first names if anything is missing, left over, of another shape, or not finite.
    """
    wanted = {
        name_of(name): (name, tuple(tensor.shape)) for name, tensor in module.state_dict().items()
    }
    problems = {
        "missing": [name for name in wanted if name not in tensors],
        "unexpected": [name for name in tensors if name not in wanted],
        "of another shape": [
            name
            for name, (_, shape) in wanted.items()
            if name in tensors and tuple(tensors[name].shape) != shape
        ],
    }
    if any(problems.values()):
        details = "; ".join(
            f"{len(names)} {kind} ({', '.join(names[:5])}{', …' if len(names) > 5 else ''})"
            for kind, names in problems.items()
            if names
        )
        raise RunError(f"{what}: its tensors don't fit an SDXL model: {details}")
    placed = {
        own: _placed(tensors[name], dtype or tensors[name].dtype, device)
        for name, (own, _) in wanted.items()
    }
    _see_finite(placed, what)
    module.load_state_dict(placed, assign=True)
    for name, buffer in module.named_buffers():
        assert name.endswith("position_ids") or not buffer.is_meta, f"{name} has no value"
        if buffer.is_meta:  # the only buffer that isn't stored
            owner = module.get_submodule(name.rpartition(".")[0])
            owner.position_ids = torch.arange(buffer.shape[-1], device=device).expand(1, -1)
    module.requires_grad_(False).eval()


def _see_finite(tensors: Mapping[str, Tensor], what: str) -> None:
    """Raise RunError for NaN and Inf, from a damaged file or values beyond float16: the loss would show them late, and blame images."""
    names = [
        name
        for name, tensor in tensors.items()
        if tensor.is_floating_point() and tensor.itemsize > 1
    ]
    if not names:
        return
    are_finite = torch.stack([tensors[name].isfinite().all() for name in names]).tolist()
    bad = [name for name, is_finite in zip(names, are_finite, strict=True) if not is_finite]
    if bad:
        raise RunError(
            f"{what}: {len(bad)} of its tensors hold numbers that aren't finite in {str(tensors[bad[0]].dtype).removeprefix('torch.')} "
            f"({', '.join(bad[:5])}{', …' if len(bad) > 5 else ''}); get the file again, or take another --mixed_precision"
        )


def _placed(tensor: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    dtype = dtype if tensor.is_floating_point() else tensor.dtype
    if device.type == "cpu":
        return tensor.to(dtype)
    memory_format = torch.channels_last if tensor.ndim == 4 else torch.preserve_format
    return tensor.to(device, non_blocking=True).to(dtype, memory_format=memory_format)


def vae_tensors(name: str) -> dict[str, Tensor]:
    """The module tensors of the VAE named by --vae: a VAE alone or a whole checkpoint, file, Diffusers folder or hub id."""
    path = locate_vae(name)
    if path.is_dir():
        return open_checkpoint(name).tensors("vae")
    file = open_tensors(path)
    prefix = (
        FILE_PREFIXES["vae"]
        if any(key.startswith(FILE_PREFIXES["vae"]) for key in file.shapes)
        else ""
    )
    kept = {key.removeprefix(prefix): file[key] for key in file.shapes if key.startswith(prefix)}
    is_diffusers = any(key.startswith("encoder.down_blocks.") for key in kept)
    return (
        layouts.module_from_folder("vae", kept)
        if is_diffusers
        else layouts.module_from_file("vae", kept)
    )
