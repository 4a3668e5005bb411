"""Placeholder tokens: tokens that the tokenizers don't have, whose embeddings are parameters of their own.

The rows are appended to the encoders' frozen tables in the embedding's forward, so nothing else can change, whatever the
optimizer does. Source: Gal et al. 2022, arXiv:2208.01618.

Shapes: n vectors of one token, C the encoder's width (768 and 1280).
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.errors import OptionError
from library.models.text_encoders import clip_body
from library.models.tokenizer import Tokenizer


class ExtendedEmbedding(nn.Module):
    """An embedding table with appended rows, for ids from `first` on. Several placeholder tokens nest their tables."""

    def __init__(self, table: "nn.Embedding | ExtendedEmbedding", rows: Tensor, first: int):
        super().__init__()
        self.table = table  # frozen
        self.rows = nn.Parameter(rows)
        self.first = first

    @property
    def weight(self) -> Tensor:
        """The rows of the vocabulary."""
        return self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        """Return the embeddings of ids [...]: [..., C], in the table's dtype."""
        is_new = ids >= self.first
        known: Tensor = self.table(ids.masked_fill(is_new, 0))
        new = F.embedding((ids - self.first).clamp(min=0), self.rows).to(known.dtype)
        return torch.where(is_new[..., None], new, known)


class TokenExistsError(OptionError):
    """The tokenizers have a token of this name already."""


class PlaceholderToken:
    """A placeholder token of n vectors, added to both tokenizers and encoders of a model; in a text it means all of them."""

    def __init__(
        self,
        tokenizers: Sequence[Tokenizer],
        encoders: Sequence[Any],
        word: str,
        rows: Sequence[Tensor],
    ):
        """Add the token.

        Args:
            tokenizers: the tokenizers of the model.
            encoders: its text encoders.
            word: the token.
            rows: the initial vectors, [n, C] for each encoder.

        Raises:
            TokenExistsError: a tokenizer has the token already.
        """
        count = len(rows[0])
        self.word = word
        words = [word, *(f"{word}{i}" for i in range(1, count))]
        for tokenizer in tokenizers:  # before any of them is changed
            if taken := first_known(tokenizer, words):
                raise TokenExistsError(
                    f"{word!r} is a word that the tokenizers know already: their token {taken!r} would have two meanings, and "
                    f"texts that have nothing to do with the new word would hold it; take one that they don't, such as {word}_1x"
                )
        self.tables: list[ExtendedEmbedding] = []
        for tokenizer, encoder, own in zip(tokenizers, encoders, rows, strict=True):
            first = len(tokenizer.clip)
            tokenizer.clip.add_tokens(words)
            tokenizer.expansions[first] = list(range(first, first + count))
            embeddings: Any = clip_body(encoder).embeddings
            table = ExtendedEmbedding(embeddings.token_embedding, own, first)
            embeddings.token_embedding = table
            self.tables.append(table)

    @property
    def rows(self) -> dict[str, nn.Parameter]:
        """The vectors by the names that files give them: [n, C] each."""
        one, two = self.tables
        return {"clip_l": one.rows, "clip_g": two.rows}


def first_known(tokenizer: Tokenizer, words: Sequence[str]) -> str | None:
    """The first token of the tokenizer that one of these words would be.

    A word of the vocabulary has its end-of-word mark with it ("sks</w>"), and is another token than the word alone: where
    only the former exists, the word can be added, and then texts give the new token. Added words are found in texts in
    capitals and in small letters alike, so "Cat" collides as "cat" does. What the vocabulary spells beyond ASCII is bytes.
    """
    known = tokenizer.clip.get_vocab()
    added = {word.lower() for word in tokenizer.clip.get_added_vocab()}
    for word in words:
        small = word.lower()
        if word in known:
            return word
        if small in added or (word.isascii() and small in known):
            return small
    return None


def first_rows(
    tokenizers: Sequence[Tokenizer], encoders: Sequence[Any], init_word: str | None, count: int
) -> list[Tensor]:
    """The first values of `count` vectors for both encoders, float32: those of the init word's tokens in turn, or the tables' means."""
    rows = []
    for tokenizer, encoder in zip(tokenizers, encoders, strict=True):
        table: Tensor = clip_body(encoder).embeddings.token_embedding.weight.detach()
        ids = tokenizer.ids(init_word) if init_word else []
        if init_word and not ids:
            raise OptionError(f"--init_word {init_word!r}: it has no tokens")
        if table.is_meta:  # of a dry run, in which a mean would import torch's compiler
            own = table.new_empty(count, table.shape[1])
        else:
            own = (
                table[[ids[i % len(ids)] for i in range(count)]]
                if ids
                else table.float().mean(0).expand(count, -1)
            )
        rows.append(own.to(torch.float32, copy=True).contiguous())
    return rows
