"""PromptEncoder: encodes prompts of any length for generation.

It differs from the captions of training (models/text_encoders.py): each chunk of 75 tokens keeps
its start and end tokens, weights keep the mean of a prompt's hidden states, and BREAK starts a new
chunk. Shapes: n chunks, T = 77 n.

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
_CACHE_SIZE = 64  # prompts


class _Tokens(NamedTuple):
    """Token ids of a prompt without start and end tokens, and their weights."""

    ids: list[int]
    weights: list[float]


class PromptEncoder:
    """Encodes prompts and caches them, as most images of a run share the negative prompt."""

    def __init__(self, models: SdxlModels, max_chunks: int | None):
        """Make an encoder.

        Args:
            models: whose tokenizers and text encoders are used.
            max_chunks: longer prompts are truncated, with a warning. None: no limit.
        """
        self._models = models
        self._max_tokens = None if max_chunks is None else max_chunks * CHUNK_TOKENS
        self._encoded: OrderedDict[tuple[object, ...], TextConditioning] = OrderedDict()
        self._warned: set[str] = set()

    def chunks(self, *texts: str) -> int:
        """Return the number of chunks of the longest text."""
        num_tokens = 0
        for text in texts:
            num_tokens = max(num_tokens, len(_tokenize(self._models.tokenizers[0], text).ids))
        if self._max_tokens is not None:
            num_tokens = min(num_tokens, self._max_tokens)
        return max(1, -(-num_tokens // CHUNK_TOKENS))

    @torch.no_grad()
    def encode(
        self, text: str, text2: str | None, chunks: int, key: object = None
    ) -> TextConditioning:
        """Encode one prompt: context [1, 77 n, 2048], pooled [1, 1280], in the encoders' dtype.

        Args:
            text: the prompt.
            text2: prompt of the second text encoder. None: the same.
            chunks: number of chunks to fill.
            key: identifies the state of the encoders (multipliers of networks) in the cache.
        """
        cache_key = (text, text2, chunks, key)
        if cache_key not in self._encoded:
            self._encoded[cache_key] = self._encode(text, text if text2 is None else text2, chunks)
            if len(self._encoded) > _CACHE_SIZE:
                self._encoded.popitem(last=False)
        self._encoded.move_to_end(cache_key)
        return self._encoded[cache_key]

    def _encode(self, text: str, text2: str, chunks: int) -> TextConditioning:
        ids, weights = [], []
        for tokenizer, prompt in zip(self._models.tokenizers, (text, text2), strict=True):
            tokens = self._truncate(_tokenize(tokenizer, prompt), prompt, tokenizer)
            chunked = torch.tensor([chunks_of(tokens.ids, tokenizer.pad, chunks)])
            ids.append(to_device(chunked, self._models.device))
            weights.append(_token_weights(tokens.weights, chunks))
        encoded = text_encoders.encode(
            ids[0], ids[1], *self._models.text_encoders, keep_markers=True
        )
        weighted = EncodedText(
            _apply_weights(encoded.hidden_1, weights[0]),
            _apply_weights(encoded.hidden_2, weights[1]),
            encoded.pooled,
        )
        return TextConditioning.of(weighted)

    def _truncate(self, tokens: _Tokens, text: str, tokenizer: Tokenizer) -> _Tokens:
        if self._max_tokens is None or len(tokens.ids) <= self._max_tokens:
            return tokens
        if text not in self._warned:
            self._warned.add(text)
            log.warning(
                "prompt has %d tokens, more than the %d of --max_embeddings_multiples; "
                "truncated: %r",
                len(tokens.ids),
                self._max_tokens,
                tokenizer.text(tokens.ids[self._max_tokens :]),
            )
        return _Tokens(tokens.ids[: self._max_tokens], tokens.weights[: self._max_tokens])


def _tokenize(tokenizer: Tokenizer, text: str) -> _Tokens:
    """Tokenize a prompt. BREAK pads it to a multiple of 77 tokens, as in the reference."""
    tokens = _Tokens([], [])
    for piece, weight in parse_weights(text):
        for i, section in enumerate(_BREAK.split(piece)):
            num_pads = 0
            if i > 0:
                num_pads = CHUNK - len(tokens.ids) % CHUNK
            ids = tokenizer.ids(section)
            tokens.ids.extend([tokenizer.pad] * num_pads + ids)
            tokens.weights.extend([1.0] * num_pads + [weight] * len(ids))
    return tokens


def _token_weights(weights: Sequence[float], chunks: int) -> Tensor:
    """Return the weight of each token, 1 for start, end and padding tokens: [1, 77 n]."""
    inner = torch.ones(chunks * CHUNK_TOKENS)
    inner[: len(weights)] = torch.tensor(weights)
    padded = torch.ones(chunks, CHUNK)
    padded[:, 1:-1] = inner.view(chunks, CHUNK_TOKENS)
    return padded.view(1, -1)


def _apply_weights(hidden: Tensor, weights: Tensor) -> Tensor:
    """Multiply each token's hidden state by its weight, and restore the mean of all of them.

    Args:
        hidden: [1, T, C].
        weights: [1, T].
    """
    if bool((weights == 1).all()):
        return hidden
    weighted = hidden * weights[..., None].to(hidden)
    mean = hidden.float().mean(dim=(1, 2), keepdim=True)
    weighted_mean = weighted.float().mean(dim=(1, 2), keepdim=True)
    return weighted * (mean / weighted_mean).to(hidden.dtype)
