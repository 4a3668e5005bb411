"""CLIP token ids without a network connection: two tokenizers, 75-token chunks, (word:1.2) weights.

Shapes: B texts, n chunks of 77 ids (a begin marker, 75 tokens, an end marker).
The vocabulary is OpenAI's (clip_vocabulary/, MIT), the same for both encoders; they differ in the id that fills a chunk.
"""

import gzip
import hashlib
import json
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from library.errors import RunError
from library.imports import import_transformers

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

BEGIN, END = 49406, 49407
CHUNK_TOKENS = 75
CHUNK = CHUNK_TOKENS + 2
_PADS = (END, 0)  # encoder 1 fills with its end marker, encoder 2 with id 0

_VOCABULARY = Path(__file__).parent / "clip_vocabulary" / "bpe_simple_vocab_16e6.txt.gz"
_VOCABULARY_SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
_NUM_MERGES = 48894

# Sub-folders of --tokenizer_cache_dir, by the tokenizers' hub ids.
_CACHE_FOLDERS = ("openai_clip-vit-large-patch14", "laion_CLIP-ViT-bigG-14-laion2B-39B-b160k")


class Tokenizer:
    """Text to ids for one encoder.

    Attributes:
        clip: the tokenizer of transformers.
        pad: the id of padding.
        expansions: ids that mean several ids, such as the first vector of a placeholder token.
    """

    def __init__(self, clip: "CLIPTokenizer", pad: int):
        self.clip = clip
        self.pad = pad
        self.expansions: dict[int, list[int]] = {}

    def ids(self, text: str) -> list[int]:
        """Return the ids of a text, without markers, not truncated.

        A special or added token within the text becomes its own id; each piece between them is cleaned by ftfy, as the
        original tokenizer did and transformers 5 doesn't.
        """
        import ftfy

        special = sorted(
            self.clip.all_special_tokens + list(self.clip.get_added_vocab()), key=len, reverse=True
        )
        pieces = re.split("(" + "|".join(map(re.escape, special)) + ")", text)
        cleaned = "".join(piece if piece in special else ftfy.fix_text(piece) for piece in pieces)
        found = self.clip(cleaned, add_special_tokens=False)["input_ids"]
        return [own for one in found for own in self.expansions.get(one, [one])]

    def text(self, ids: Sequence[int]) -> str:
        """Return the text of ids, as closely as tokens preserve it."""
        return self.clip.decode(list(ids)).strip()


class Tokens(NamedTuple):
    """The ids of a batch, [B, n, 77] int64; each token's weight, [B, 75 n + 2] float32; what was too long: (text, its end)."""

    ids: Tensor
    weights: Tensor
    cut: tuple[tuple[str, str], ...] = ()


def encode(
    tokenizer: Tokenizer,
    texts: Sequence[str],
    max_token_length: int = CHUNK_TOKENS,
    *,
    weighted: bool = False,
) -> Tokens:
    """The ids of `texts`, cut at `max_token_length` tokens, in chunks of 75.

    Args:
        max_token_length: a multiple of 75.
        weighted: read (a:1.2) and [a] as weights instead of text.
    """
    rows, weights, cut = [], [], []
    for text in texts:
        ids: list[int] = []
        factors: list[float] = []
        for piece, weight in parse_weights(text) if weighted else [(text, 1.0)]:
            piece_ids = tokenizer.ids(piece)
            ids += piece_ids
            factors += [weight] * len(piece_ids)
        if len(ids) > max_token_length:
            cut.append((text, tokenizer.text(ids[max_token_length:])))
        ids, factors = ids[:max_token_length], factors[:max_token_length]
        rows.append(chunks_of(ids, tokenizer.pad, max_token_length // CHUNK_TOKENS))
        weights.append([1.0, *factors] + [1.0] * (max_token_length + 1 - len(factors)))
    return Tokens(torch.tensor(rows), torch.tensor(weights), tuple(cut))


def chunks_of(ids: list[int], pad: int, count: int) -> list[list[int]]:
    """Return [count, 77]: every chunk has a begin marker; an end marker follows the text, and ends a full chunk."""
    row = [BEGIN, *ids, END]
    row += [pad] * (count * CHUNK_TOKENS + 2 - len(row))
    chunks = []
    for k in range(count):
        inner = row[1 + k * CHUNK_TOKENS : 1 + (k + 1) * CHUNK_TOKENS]
        chunk = [BEGIN, *inner, row[-1]]
        if pad != END and count > 1:
            if chunk[-2] not in (END, pad):  # the text goes on: this chunk needs an end of its own
                chunk[-1] = END
            if chunk[1] == pad:  # an empty chunk starts with the end
                chunk[1] = END
        chunks.append(chunk)
    return chunks


# -------------------------------------------------------------------------------------------------------------- weights

_ESCAPED_OR_MARK = re.compile(
    r"\\[()\[\]\\]|[()\[\]]|:\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*\)|[^\\()\[\]:]+|:|\\"
)
_ROUND, _SQUARE = 1.1, 1 / 1.1


def parse_weights(text: str) -> list[tuple[str, float]]:
    r"""Pieces of a text and their weights: (a) x 1.1, [a] / 1.1, (a:w) x w, nested; `\(` is a bracket of the text.

    A bracket that is never closed reaches to the end. A backslash before anything else is dropped, as in the reference:
    `foo\_bar` is foo_bar; `\\` is a backslash.

    >>> parse_weights(r"a (red:1.5) [cat] \(x\)")
    [('a ', 1.0), ('red', 1.5), (' ', 1.0), ('cat', 0.9090909090909091), (' (x)', 1.0)]
    """
    pieces: list[list] = []
    open_round: list[int] = []
    open_square: list[int] = []

    def weigh(start: int, factor: float) -> None:
        for piece in pieces[start:]:
            piece[1] *= factor

    for match in _ESCAPED_OR_MARK.finditer(text):
        word, weight = match[0], match[1]
        if word == "(":
            open_round.append(len(pieces))
        elif word == "[":
            open_square.append(len(pieces))
        elif weight is not None and open_round:
            weigh(open_round.pop(), float(weight))
        elif word == ")" and open_round:
            weigh(open_round.pop(), _ROUND)
        elif word == "]" and open_square:
            weigh(open_square.pop(), _SQUARE)
        else:
            pieces.append([word.removeprefix("\\"), 1.0])
    for start in open_round:
        weigh(start, _ROUND)
    for start in open_square:
        weigh(start, _SQUARE)
    merged: list[list] = []
    for piece, weight in pieces or [["", 1.0]]:
        if merged and merged[-1][1] == weight:
            merged[-1][0] += piece
        else:
            merged.append([piece, weight])
    return [(piece, weight) for piece, weight in merged]


# -------------------------------------------------------------------------------------------------------------- loading


def load_tokenizers(
    cache_dir: Path | None, diffusers_folder: Path | None
) -> tuple[Tokenizer, Tokenizer]:
    """The tokenizers of both encoders: from --tokenizer_cache_dir, else the model's own folder, else our vocabulary.

    A cache folder without tokenizers gets ours, as sd-scripts saves those it has downloaded.
    """
    one, two = (_load(cache_dir, diffusers_folder, number) for number in (0, 1))
    return one, two


def _load(cache_dir: Path | None, diffusers_folder: Path | None, number: int) -> Tokenizer:
    cached = None if cache_dir is None else cache_dir / _CACHE_FOLDERS[number]
    own = (
        None
        if diffusers_folder is None
        else diffusers_folder / ("tokenizer", "tokenizer_2")[number]
    )
    for folder in (cached, own):
        if folder is not None and any(
            (folder / name).exists() for name in ("vocab.json", "tokenizer.json")
        ):
            return Tokenizer(_read_folder(folder), _PADS[number])
    clip = _built_in()
    if cached is not None:
        clip.save_pretrained(cached)
    return Tokenizer(clip, _PADS[number])


def _read_folder(folder: Path) -> "CLIPTokenizer":
    """The tokenizer in a folder: its vocabulary, and the tokens added to it.

    Not by from_pretrained: encoder 2's configuration names "!" as its pad token, which would make "!" in a caption a pad.
    """
    try:
        whole = _read_json(folder / "tokenizer.json")
        if (folder / "vocab.json").exists():
            vocabulary = _read_json(folder / "vocab.json")
            merges = [
                line.split()
                for line in (folder / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
            ]
        else:
            vocabulary, merges = whole["model"]["vocab"], whole["model"]["merges"]
        pairs = [
            tuple(merge.split() if isinstance(merge, str) else merge) for merge in merges if merge
        ]
        clip = import_transformers().CLIPTokenizer(
            vocab=vocabulary, merges=pairs, model_max_length=CHUNK
        )
        # Where the versions of transformers have kept added tokens.
        added = {token["id"]: token["content"] for token in whole.get("added_tokens", [])}
        decoder = _read_json(folder / "tokenizer_config.json").get("added_tokens_decoder", {})
        added |= {int(i): token["content"] for i, token in decoder.items()}
        added |= {i: token for token, i in _read_json(folder / "added_tokens.json").items()}
        clip.add_tokens([added[i] for i in sorted(added) if i >= len(vocabulary)])
        return clip
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{folder}: no CLIP tokenizer can be read here: {error}") from None


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write a tokenizer as Diffusers folders have it: encoder 2's names "!", id 0, as its pad token."""
    tokenizer.clip.save_pretrained(folder)
    config = folder / "tokenizer_config.json"
    values = json.loads(config.read_text(encoding="utf-8"))
    values["pad_token"] = "!" if tokenizer.pad == 0 else "<|endoftext|>"
    config.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _built_in() -> "CLIPTokenizer":
    vocabulary, merges = _vocabulary()
    return import_transformers().CLIPTokenizer(
        vocab=dict(vocabulary), merges=list(merges), model_max_length=CHUNK
    )


@cache
def _vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    packed = _VOCABULARY.read_bytes()
    if hashlib.sha256(packed).hexdigest() != _VOCABULARY_SHA256:
        raise RunError(f"{_VOCABULARY}: damaged: its checksum is not the one of CLIP's vocabulary")
    lines = gzip.decompress(packed).decode("utf-8").split("\n")
    merges = [(line.split()[0], line.split()[1]) for line in lines[1 : 1 + _NUM_MERGES]]
    letters = _byte_letters()
    words = (
        letters
        + [letter + "</w>" for letter in letters]
        + ["".join(pair) for pair in merges]
        + ["<|startoftext|>", "<|endoftext|>"]
    )
    return {word: i for i, word in enumerate(words)}, merges


def _byte_letters() -> list[str]:
    """A printable letter for each byte, in the vocabulary's order: the printable bytes first, then the others."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]
