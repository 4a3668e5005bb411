"""Text: prompts of any length to what the U-Net wants, as pictures are drawn from them.

Differs from captions of training (models/text_encoders.py): each chunk of 75 tokens keeps its markers, weights leave the
mean of a prompt as it was, and BREAK starts a new chunk. Shapes: n chunks, T = 77 n.

Source: contract, training_math.md section 10.
"""

import re
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from library.device import to_device
from library.log import log
from library.models import text_encoders
from library.models.sdxl import SdxlModels
from library.models.text_encoders import EncodedText, TextConditioning
from library.models.tokenizer import CHUNK, CHUNK_TOKENS, Tokenizer, chunks_of, parse_weights

_BREAK = re.compile(r"\s*\bBREAK\b\s*")
_REMEMBERED = 64  # texts


class _Tokens(NamedTuple):
    """A prompt's ids, without markers, and their weights."""

    ids: list[int]
    weights: list[float]


class PromptEncoder:
    """Encodes prompts, each once: a negative prompt is mostly the same for all pictures.

    Args of the constructor: max_chunks: chunks at which prompts are cut, which is told; None: no limit.
    """

    def __init__(self, models: SdxlModels, max_chunks: int | None):
        self._models = models
        self._max_tokens = None if max_chunks is None else max_chunks * CHUNK_TOKENS
        self._encoded: OrderedDict[tuple[object, ...], TextConditioning] = OrderedDict()
        self._told: set[str] = set()

    def chunks(self, *texts: str) -> int:
        """The least chunks into which all of the texts fit."""
        counts = [len(_tokens(self._models.tokenizers[0], text).ids) for text in texts]
        tokens = max(counts, default=0)
        if self._max_tokens is not None:
            tokens = min(tokens, self._max_tokens)
        return max(1, -(-tokens // CHUNK_TOKENS))

    @torch.no_grad()
    def encode(self, text: str, second: str | None, chunks: int, key: object = None) -> TextConditioning:
        """One prompt: context [1, 77 n, 2048], pooled [1, 1280], in the encoders' dtype.

        Args:
            second: what encoder 2 reads; None: the same.
            key: what changes the encoders (multipliers of networks); texts are remembered with it.
        """
        whole = (text, second, chunks, key)
        if whole not in self._encoded:
            self._encoded[whole] = self._encode(text, text if second is None else second, chunks)
            if len(self._encoded) > _REMEMBERED:
                self._encoded.popitem(last=False)
        self._encoded.move_to_end(whole)
        return self._encoded[whole]

    def _encode(self, text: str, second: str, chunks: int) -> TextConditioning:
        ids, weights = [], []
        for tokenizer, own in zip(self._models.tokenizers, (text, second), strict=True):
            tokens = self._cut(_tokens(tokenizer, own), own, tokenizer)
            ids.append(to_device(torch.tensor([chunks_of(tokens.ids, tokenizer.pad, chunks)]), self._models.device))
            weights.append(_weights_by_place(tokens.weights, chunks))
        encoded = text_encoders.encode(ids[0], ids[1], *self._models.text_encoders, keep_markers=True)
        return TextConditioning.of(
            EncodedText(_weighed(encoded.hidden_1, weights[0]), _weighed(encoded.hidden_2, weights[1]), encoded.pooled)
        )

    def _cut(self, tokens: _Tokens, text: str, tokenizer: Tokenizer) -> _Tokens:
        if self._max_tokens is None or len(tokens.ids) <= self._max_tokens:
            return tokens
        if text not in self._told:
            self._told.add(text)
            log.warning(
                "a prompt has %d tokens, more than the %d of --max_embeddings_multiples; left out: %r",
                len(tokens.ids), self._max_tokens, tokenizer.text(tokens.ids[self._max_tokens :]),
            )  # fmt: skip
        return _Tokens(tokens.ids[: self._max_tokens], tokens.weights[: self._max_tokens])


def _tokens(tokenizer: Tokenizer, text: str) -> _Tokens:
    """The tokens of a prompt; BREAK fills up with pads, to a multiple of 77 as in the reference."""
    found = _Tokens([], [])
    for piece, weight in parse_weights(text):
        for number, part in enumerate(_BREAK.split(piece)):
            fill = CHUNK - len(found.ids) % CHUNK if number else 0
            own = tokenizer.ids(part)
            found.ids.extend([tokenizer.pad] * fill + own)
            found.weights.extend([1.0] * fill + [weight] * len(own))
    return found


def _weights_by_place(weights: Sequence[float], chunks: int) -> Tensor:
    """The weight of each place, markers and pads 1: [1, 77 n]."""
    inner = torch.ones(chunks * CHUNK_TOKENS)
    inner[: len(weights)] = torch.tensor(weights)
    whole = torch.ones(chunks, CHUNK)
    whole[:, 1:-1] = inner.view(chunks, CHUNK_TOKENS)
    return whole.view(1, -1)


def _weighed(hidden: Tensor, weights: Tensor) -> Tensor:
    """Each token's states times its weight, then all brought back to the mean that they had. hidden: [1, T, C]."""
    if bool((weights == 1).all()):
        return hidden
    weighed = hidden * weights[..., None].to(hidden)
    means = [states.float().mean(dim=(1, 2), keepdim=True) for states in (hidden, weighed)]
    return weighed * (means[0] / means[1]).to(hidden.dtype)
