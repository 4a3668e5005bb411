"""Tokens and text encoders against golden 03, and the projection that single files store the other way round."""

import json
from pathlib import Path

import pytest
import torch
from golden_model import live_tensors
from messages import mentioning
from tolerance import assert_network

from library.models import text_encoders
from library.models import tokenizer as tokens
from library.models.memory.activation_checkpointing import ActivationPolicy
from library.models.tokenizer import BEGIN, END, load_tokenizers, parse_weights, save_tokenizer
from library.safetensors_io import load_tensors
from networks.targets import text_encoder_targets

pytestmark = pytest.mark.numeric

GOLDEN = Path(__file__).parent / "golden"
TEXT = json.loads((GOLDEN / "03_text.json").read_text(encoding="utf-8"))
CASES = TEXT["cases"]


@pytest.fixture(scope="module")
def golden():
    return load_tensors(GOLDEN / "03_text.safetensors")[0]


@pytest.fixture(scope="module")
def tokenizers():
    return load_tokenizers(None, None)


def test_golden_03_every_text_gives_the_same_ids(tokenizers):
    for row in TEXT["tokenize_raw"]:
        for tokenizer in tokenizers:
            assert [BEGIN, *tokenizer.ids(row["text"]), END] == row["ids"], row["text"]


def test_an_exclamation_mark_is_no_pad_token(tokenizers):
    assert [tokenizer.ids("cat!") for tokenizer in tokenizers] == [[2368, 256]] * 2


def test_fault_39_curly_quotes_give_the_ids_of_the_original_tokenizer(tokenizers):
    assert tokenizers[0].ids("don’t") == tokenizers[0].ids("don't")


@pytest.mark.parametrize("row", TEXT["parse_weights"], ids=lambda row: repr(row["text"])[:40])
def test_golden_03_weights_of_brackets(row):
    found = parse_weights(row["text"])
    assert [text for text, _ in found] == [text for text, _ in row["result"]]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in row["result"]])


@pytest.mark.parametrize(
    "text, expected",
    [
        ("\\", [("", 1.0)]),
        (r"foo\_bar", [("foo_bar", 1.0)]),
        (r"a \\ b", [("a \\ b", 1.0)]),
        (r"(a)\ b\(c\)", [("a", 1.1), (" b(c)", 1.0)]),
        ("(a\\", [("a", 1.1)]),
    ],
)
def test_a_lone_backslash_is_dropped_and_a_double_one_is_a_backslash(text, expected):
    """As the reference does, whose users escape more than brackets (`long\\_hair`)."""
    found = parse_weights(text)
    assert [piece for piece, _ in found] == [piece for piece, _ in expected]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in expected])


@pytest.mark.parametrize("text", ["to be continued: ...", "a:1.2.3", "x: ."])
def test_what_is_no_number_behind_a_colon_is_text(text):
    assert parse_weights(f"({text})") == [(text, 1.1)]


@pytest.mark.parametrize("name", list(CASES))
def test_golden_03_ids_states_and_pool(name, golden, golden_models):
    case = CASES[name]
    texts = [TEXT["prompts"][i] for i in case["prompt_index"]]
    length = case["max_token_length"] or 75
    one, two = (
        tokens.encode(t, texts, length, weighted=case["weighted"]) for t in golden_models.tokenizers
    )
    assert torch.equal(one.ids, golden[f"{name}.input_ids1"]) and torch.equal(
        two.ids, golden[f"{name}.input_ids2"]
    )
    with torch.no_grad():
        found = golden_models.encode_texts(texts, length, weighted=case["weighted"])
    for part, expected in zip(found, ("hidden1", "hidden2", "pool"), strict=True):
        assert_network(part, golden[f"{name}.{expected}"], expected)


def test_golden_03_single_files_store_the_projection_for_x_at_p(golden, golden_models):
    """sgm_pool is the original's and Diffusers' answer; peer_pool what sd-scripts makes of the same file."""
    stored = golden_models.checkpoint.file_tensors("text_encoder_2") | {
        "text_projection": golden["projection.checkpoint_tensor"]
    }
    from library.models.checkpoint.layouts import file_from_module, module_from_file

    loaded = module_from_file("text_encoder_2", stored)
    one, two = (tokens.encode(t, TEXT["prompts"]).ids for t in golden_models.tokenizers)
    encoder_1, encoder_2 = golden_models.text_encoders
    kept = encoder_2.text_projection.weight.data
    try:
        encoder_2.text_projection.weight.data = loaded["text_projection.weight"]
        with torch.no_grad():
            pooled = text_encoders.encode(one, two, encoder_1, encoder_2).pooled
    finally:
        encoder_2.text_projection.weight.data = kept
    assert_network(pooled, golden["projection.sgm_pool"])
    assert (pooled - golden["projection.peer_pool"]).abs().max() > 1
    assert torch.equal(
        file_from_module("text_encoder_2", loaded)["text_projection"],
        golden["projection.checkpoint_tensor"],
    )


def test_gradients_pass_through_long_and_checkpointed_prompts(golden_model):
    from conftest import open_models

    gradients = []
    for checkpointing in (False, True):
        models = open_models(
            golden_model, checkpointing=ActivationPolicy("full" if checkpointing else None)
        )
        for encoder in models.text_encoders:
            encoder.train()
        weight = (
            text_encoders.clip_body(models.text_encoders[0])
            .encoder.layers[0]
            .mlp.fc1.weight.requires_grad_()
        )
        encoded = models.encode_texts([TEXT["prompts"][5]], 150)
        sum(part.square().sum() for part in encoded).backward()
        gradients.append(weight.grad)
    assert_network(gradients[0], gradients[1])
    assert gradients[0].norm() > 0


def test_fault_22_encoder_names_keep_text_model_whatever_transformers_calls_them(golden_models):
    for part in ("text_encoder_1", "text_encoder_2"):
        names = set(live_tensors(golden_models)[part])
        assert names == set(golden_models.checkpoint.tensors(part))
        assert all(
            name.startswith("text_model.") or name == "text_projection.weight" for name in names
        )


def test_an_outline_has_the_names_shapes_and_layers_of_its_encoder(golden_models):
    """So what is counted, rehearsed and refused by it is what a run does."""
    for number, encoder in enumerate(golden_models.text_encoders, 1):
        drawn = text_encoders.text_encoder_skeleton(
            golden_models.checkpoint.tensors(f"text_encoder_{number}")
        )
        whole = {
            text_encoders.module_name(encoder, name): tensor
            for name, tensor in encoder.named_parameters()
        }
        shapes = [
            {name: tensor.shape for name, tensor in one.items()}
            for one in (dict(drawn.named_parameters()), whole)
        ]
        assert shapes[0] == shapes[1]
        one, two = (list(text_encoder_targets(module, number - 1)) for module in (drawn, encoder))
        assert [(t.name, t.is_used, t.layer.weight.shape) for t in one] == [(t.name, t.is_used, t.layer.weight.shape) for t in two]  # fmt: skip
        assert len(one) > 10 and all(t.layer.weight.is_meta for t in one)


def test_the_tokenizer_cache_folder_is_filled_once_and_read_back(tmp_path):
    load_tokenizers(tmp_path, None)
    folders = {path.name for path in tmp_path.iterdir()}
    assert folders == {"openai_clip-vit-large-patch14", "laion_CLIP-ViT-bigG-14-laion2B-39B-b160k"}
    again = load_tokenizers(tmp_path, None)
    for row in TEXT["tokenize_raw"]:
        assert [BEGIN, *again[1].ids(row["text"]), END] == row["ids"]
    assert [tokenizer.pad for tokenizer in again] == [END, 0]


def test_a_diffusers_folders_tokenizers_are_honoured(tmp_path, tokenizers):
    """Here with a token of their own, and "!" named as pad token, as SDXL's second tokenizer has it."""
    for tokenizer, name in zip(
        load_tokenizers(None, None), ("tokenizer", "tokenizer_2"), strict=True
    ):
        tokenizer.clip.add_tokens(["<mine>"])
        save_tokenizer(tokenizer, tmp_path / name)
    assert (
        json.loads((tmp_path / "tokenizer_2" / "tokenizer_config.json").read_text())["pad_token"]
        == "!"
    )
    for tokenizer in load_tokenizers(None, tmp_path):
        assert tokenizer.ids("a <mine> cat!") == [320, 49408, 2368, 256]


def test_a_damaged_vocabulary_is_told(monkeypatch, tmp_path):
    import gzip

    damaged = tmp_path / "vocabulary.gz"
    damaged.write_bytes(gzip.compress(b"x"))
    monkeypatch.setattr(tokens, "_VOCABULARY", damaged)
    tokens._vocabulary.cache_clear()
    with pytest.raises(Exception, match=mentioning(damaged, "checksum")):
        load_tokenizers(None, None)
    tokens._vocabulary.cache_clear()
