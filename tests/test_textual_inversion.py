"""Textual Inversion: golden 10 `ti`, files that Diffusers loads, frozen tables, and a token beside a LoRA."""

import random
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import open_models
from forked import end_together, processes
from messages import mentioning, mentions
from replay import Golden, replay
from running import ROOT, assert_bit_equal, losses_of, tensors_of, without
from tolerance import REPLAYED_EMBEDDING

from library.errors import OptionError
from library.images import load, normalized
from library.models.noise_schedule import NoiseSchedule
from library.models.size_conditioning import conditioning_vector
from library.models.text_encoders import TextConditioning, clip_body
from library.models.textual_inversion import PlaceholderToken, first_known, first_rows
from library.models.vae import scale_latents
from library.rng import generator
from library.safetensors_io import read_header
from library.training.objective.noise import add_noise
from library.training.options.objective import LossOptions
from library.training.options.optimizer import ScheduleOptions
from library.training.options.tasks import EmbeddingOptions
from library.training.tasks.base import TaskSettings
from library.training.tasks.embedding import EmbeddingTask, add_placeholder_token
from tools import make_tiny_sdxl
from tools.make_tiny_dataset import make_images

QUICK = [
    "--token_string", "mytoken", "--init_word", "red cat", "--num_vectors_per_token", "3", "--resolution", "64", "--enable_bucket", "--min_bucket_reso", "32",
    "--max_bucket_reso", "128", "--bucket_reso_steps", "32", "--cache_latents", "--max_data_loader_n_workers", "0", "--learning_rate", "0.05",
    "--seed", "7", "--use_object_template", "--save_model_as", "safetensors", "--output_name", "lora",
]  # fmt: skip


def train(model, images, output, *extra, quick=QUICK):
    import sdxl_train_textual_inversion

    files = [
        "--pretrained_model_name_or_path",
        model,
        "--train_data_dir",
        images,
        "--output_dir",
        output,
    ]
    sdxl_train_textual_inversion.main([str(word) for word in [*quick, *files, *extra]])
    return output / "lora.safetensors"


def test_golden_10_ti(own_models):
    """The reference trains whole tables and puts the old rows back; the new rows come out the same."""
    golden = Golden("ti")
    options = EmbeddingOptions(token_string="mytoken", init_word="red cat", num_vectors_per_token=3)
    task = EmbeddingTask(own_models, TaskSettings(lr=5e-2, num_tokens=75), (options,))
    rows = task.trainables[0].tensors()
    steps = replay(
        golden, own_models, task, optimizer_args={}, schedule=ScheduleOptions(), loss=LossOptions(), lr=5e-2, accumulation=1, cached_text=False,
        caption=lambda text: text.replace("mytoken mytoken1 mytoken2", "mytoken"),
        checks_norm=False,  # there it is that of encoder 2's whole table
    )  # fmt: skip
    for number, rates in steps:
        assert rates == golden.facts["lr_per_step"][number]
    for name, expected in golden.output.items():
        torch.testing.assert_close(rows[name].detach(), expected, rtol=0, atol=REPLAYED_EMBEDDING)


def test_rows_lie_behind_frozen_tables_and_only_they_get_gradients(own_models):
    tables = [
        clip_body(encoder).embeddings.token_embedding.weight.detach().clone()
        for encoder in own_models.text_encoders
    ]
    token = add_placeholder_token(own_models, "zyx", "red", 2)
    encoded = own_models.encode_texts(["a zyx here", "nothing"], 75)
    (encoded.hidden_1[0].sum() + encoded.pooled.sum()).backward()
    for table, encoder, rows in zip(
        tables, own_models.text_encoders, token.rows.values(), strict=True
    ):
        embedding = clip_body(encoder).embeddings.token_embedding
        assert torch.equal(embedding.weight, table) and embedding.weight.grad is None
        assert rows.grad.abs().sum() > 0 and rows.dtype is torch.float32
    assert [p for encoder in own_models.text_encoders for p in encoder.parameters() if p.requires_grad] == list(token.rows.values())  # fmt: skip


@pytest.mark.parametrize("weighted", [False, True])
def test_captions_have_weights_where_they_are_asked_for(weighted, own_models):
    task = EmbeddingTask(own_models, TaskSettings(lr=1.0, num_tokens=75, weighted_captions=weighted), (EmbeddingOptions(token_string="zyx"),))  # fmt: skip
    with torch.no_grad():
        found = task.encode_text(SimpleNamespace(captions=["a (zyx:1.5) cat"], text=None))
        wanted = TextConditioning.of(
            own_models.encode_texts(["a (zyx:1.5) cat"], 75, weighted=weighted)
        )
    assert torch.equal(found.context, wanted.context)


def test_a_new_word_is_all_of_its_vectors_wherever_the_tokenizer_finds_it(own_models):
    """In capitals, at the start of another word, more than once; a second word that begins as it does is its own."""
    tokenizer, first = own_models.tokenizers[1], len(own_models.tokenizers[1].clip)
    add_placeholder_token(own_models, "zyx", "red", 3)
    add_placeholder_token(own_models, "Zyxw", "red", 2)
    one, two = [first, first + 1, first + 2], [first + 3, first + 4]
    of = {word: tokenizer.ids(word) for word in ("a", ",", "s")}
    assert tokenizer.ids("Zyx a zyx, a zyxw") == one + of["a"] + one + of[","] + of["a"] + two
    assert tokenizer.ids("zyxs") == one + of["s"]


def test_without_gradient_a_new_word_that_starts_as_another_reads_like_it(own_models):
    add_placeholder_token(own_models, "zyx", "cat", 1)
    new, old = (own_models.encode_texts([text], 75) for text in ("a zyx sits", "a cat sits"))
    for one, two in zip(new, old, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)


def test_first_values_are_the_init_words_in_turn_or_the_mean(own_models):
    one, _ = first_rows(own_models.tokenizers, own_models.text_layers, "red cat", 3)
    table = clip_body(own_models.text_encoders[0]).embeddings.token_embedding.weight
    red, cat = own_models.tokenizers[0].ids("red cat")
    assert torch.equal(one, table[[red, cat, red]])
    torch.testing.assert_close(
        first_rows(own_models.tokenizers, own_models.text_layers, None, 2)[0],
        table.mean(0).expand(2, -1),
    )


def test_known_words_are_refused(own_models):
    with pytest.raises(OptionError, match=mentioning("'cat'", "tokenizer", "cat_1x")):
        PlaceholderToken(
            own_models.tokenizers,
            own_models.text_layers,
            "cat",
            first_rows(own_models.tokenizers, own_models.text_layers, None, 1),
        )


def test_a_word_of_the_vocabulary_that_ends_there_is_new_and_a_bare_token_is_not(own_models):
    """sks and ohwx, which people train: "sks</w>" is one id, "sks" none. In texts, the new token is found from then on."""
    tokenizer = own_models.tokenizers[0]
    known = tokenizer.clip.get_vocab()
    whole_words = [token.removesuffix("</w>") for token in known if token.endswith("</w>")]
    assert len(whole_words) == 34_483 and sum(word not in known for word in whole_words) == 26_063
    for word in (
        "sks",
        "ohwx",
        *random.Random(0).sample([word for word in whole_words if word not in known], 20),
    ):
        assert first_known(tokenizer, [word]) is None, word
    for word in ("cat", "Cat", "CAT", "!", "<|endoftext|>"):
        assert first_known(tokenizer, ["zyx", word]) == word.lower(), word
    assert len(tokenizer.ids("sks")) == 1
    token = add_placeholder_token(own_models, "sks", "cat", 2)
    first = token.tables[0].first
    assert tokenizer.ids("a sks cat") == [
        *tokenizer.ids("a"),
        first,
        first + 1,
        *tokenizer.ids("cat"),
    ]
    encoded = own_models.encode_texts(["sks"], 75)
    encoded.hidden_1.sum().backward()
    assert token.rows["clip_l"].grad.abs().sum(dim=1).all()
    assert first_known(tokenizer, ["SKS"]) == "sks"


def test_the_file_has_the_contracts_tensors_and_metadata_and_goes_on(
    golden_model, images, tmp_path
):
    path = train(
        golden_model,
        images,
        tmp_path / "out",
        "--max_train_steps",
        "2",
        "--save_every_n_steps",
        "1",
    )
    tensors = tensors_of(path)
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == {"clip_l": ((3, 64), torch.float32), "clip_g": ((3, 128), torch.float32)}  # fmt: skip
    metadata = read_header(path).metadata
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base/textual-inversion"
    assert not [key for key in metadata if not key.startswith("modelspec.")]
    again = train(golden_model, images, tmp_path / "again", "--max_train_steps", "1", "--weights", path, "--learning_rate", "1e-9")  # fmt: skip
    for name, tensor in tensors_of(again).items():
        torch.testing.assert_close(tensor, tensors[name], rtol=0, atol=1e-7)
    with pytest.raises(
        OptionError,
        match=mentioning(
            "--weights", path, "clip_l", "[3, 64]", "[2, 64]", "--num_vectors_per_token", "2"
        ),
    ):
        train(
            golden_model, images, tmp_path / "no", "--weights", path, "--num_vectors_per_token", "2"
        )


def test_pickles_hold_the_bare_tensors(golden_model, images, tmp_path):
    train(golden_model, images, tmp_path / "out", "--max_train_steps", "1", "--save_model_as", "pt")
    found = torch.load(tmp_path / "out" / "lora.pt", weights_only=True)
    assert set(found) == {"clip_l", "clip_g"}


def test_diffusers_loads_it_for_both_encoders(golden_model, golden_models, images, tmp_path):
    """load_textual_inversion, as its documentation shows it for SDXL."""
    from library.imports import import_diffusers

    import_diffusers()
    from diffusers.loaders import TextualInversionLoaderMixin

    path = train(golden_model, images, tmp_path / "out", "--max_train_steps", "1")
    tensors = tensors_of(path)

    class Pipeline(TextualInversionLoaderMixin):
        components, hf_device_map = {}, None

    from conftest import open_models

    models = open_models(golden_model)
    for name, tokenizer, encoder in zip(
        ("clip_l", "clip_g"), models.tokenizers, models.text_encoders, strict=True
    ):
        Pipeline().load_textual_inversion(
            tensors[name], token="mytoken", text_encoder=encoder, tokenizer=tokenizer.clip
        )
        ids = tokenizer.clip.convert_tokens_to_ids(["mytoken", "mytoken_1", "mytoken_2"])
        assert torch.equal(encoder.get_input_embeddings().weight[ids].detach(), tensors[name])


@pytest.mark.parametrize("extra", [
    ["--gradient_checkpointing", "--max_token_length", "150", "--mixed_precision", "bf16"], pytest.param([], marks=pytest.mark.long),
    pytest.param(["--optimizer_type", "Adafactor"], marks=pytest.mark.long),
])  # fmt: skip
def test_resuming_is_bit_equal(extra, golden_model, images, tmp_path):
    words = [
        *extra,
        "--max_train_steps",
        "4",
        "--save_state",
        "--save_every_n_steps",
        "2",
        "--ema_decay",
        "0.9",
    ]
    whole = train(golden_model, images, tmp_path / "whole", *words)
    import shutil

    shutil.copytree(
        tmp_path / "whole" / "lora-step00000002-state",
        tmp_path / "parts" / "lora-step00000002-state",
    )
    parts = train(golden_model, images, tmp_path / "parts", *words, "--auto_resume")
    assert_bit_equal(tensors_of(whole), tensors_of(parts))
    assert losses_of(tmp_path / "whole")[2:] == losses_of(tmp_path / "parts")


def test_captions_are_looked_through_for_the_word(golden_model, images, tmp_path, capsys):
    words = without(QUICK, "--use_object_template")
    with pytest.raises(
        OptionError,
        match=mentioning("caption", "'mytoken'", "--class_tokens", "--use_object_template"),
    ):
        train(golden_model, images, tmp_path / "none", "--max_train_steps", "1", quick=words)
    texts = sorted((images / "2_shapes").glob("*.txt"))
    for path in texts[:3]:
        path.write_text("mytoken, " + path.read_text(encoding="utf-8"), encoding="utf-8")
    train(golden_model, images, tmp_path / "out", "--max_train_steps", "1", quick=words)
    told = capsys.readouterr().err
    assert mentions(told, "WARNING", "1", "4", "'mytoken'", texts[3].with_suffix("").name)


@pytest.mark.parametrize("extra, tokens", [
    (["--cache_text_encoder_outputs"], ["--cache_text_encoder_outputs", "Textual Inversion", "captions"]),
    (["--token_string", "two words"], ["--token_string", "'two words'", "space"]),
    (["--token_string", ""], ["--token_string", "missing|required|needed"]),
    (["--weights", "gone.pt"], ["--weights", "gone.pt", "file"]),
])  # fmt: skip
def test_what_cant_work_is_refused(extra, tokens, golden_model, images, tmp_path):
    with pytest.raises(OptionError, match=mentioning(*tokens)):
        train(golden_model, images, tmp_path / "out", *extra)
    assert "torch" in sys.modules and not (tmp_path / "out").exists()


def test_samples_show_the_word_and_validation_and_the_average_see_it(
    golden_model, images, tmp_path
):
    """What is drawn without the word stays as it was, bit by bit."""
    out, prompts = tmp_path / "out", tmp_path / "prompts.txt"
    prompts.write_text("a mytoken --s 1 --d 1\na red square --s 1 --d 1\n", encoding="utf-8")
    words = [
        "--sample_prompts",
        prompts,
        "--sample_every_n_steps",
        "2",
        "--sample_at_first",
        "--max_train_steps",
        "2",
    ]
    words += [
        "--validation_split",
        "0.5",
        "--validate_every_n_steps",
        "1",
        "--save_best",
        "--ema_decay",
        "0.9",
    ]
    path = train(golden_model, images, out, *words)
    drawn = {
        tuple(file.name.split("_")[1:3]): file.read_bytes()
        for file in (out / "sample").glob("lora_[0e]*.png")
    }
    assert (
        drawn["e000000", "01"] == drawn["000002", "01"]
        and drawn["e000000", "00"] != drawn["000002", "00"]
    )
    assert len(set(losses_of(out, "loss/validation/step_average"))) == 2
    assert tensors_of(out / "lora-best.safetensors").keys() == {"clip_l", "clip_g"}
    assert not torch.equal(
        tensors_of(out / "lora-ema.safetensors")["clip_l"], tensors_of(path)["clip_l"]
    )


# ----------------------------------------------------------------------------------------------- a token beside a LoRA


def test_pivotal_tuning_trains_both_and_saves_both(golden_model, images, tmp_path):
    from running import QUICK as NETWORK
    from running import train_network

    for path in (images / "2_shapes").glob("*.txt"):
        path.write_text("zyx " + path.read_text(encoding="utf-8"), encoding="utf-8")
    quick = without(NETWORK, "--cache_text_encoder_outputs")
    words = [
        "--train_token",
        "zyx",
        "--token_init_word",
        "red",
        "--token_vectors",
        "2",
        "--token_lr",
        "0.01",
        "--max_train_steps",
        "4",
    ]
    words += ["--save_every_n_steps", "2", "--ti_stop_ratio", "0.5", "--save_state"]
    path = train_network(golden_model, images, tmp_path / "out", *words, quick=quick)
    lora, token = tensors_of(path), tensors_of(path.with_name("lora-zyx.safetensors"))
    assert token["clip_l"].shape == (2, 64) and not [
        name for name in lora if not name.startswith("lora_unet")
    ]
    half = tensors_of(path.with_name("lora-step00000002-zyx.safetensors"))
    assert_bit_equal(token, half)  # stopped after half of the steps
    ups = [name for name in lora if name.endswith("lora_up.weight")]
    early = tensors_of(path.with_name("lora-step00000002.safetensors"))
    assert any(not torch.equal(lora[name], early[name]) for name in ups)
    bundled = train_network(
        golden_model, images, tmp_path / "bundled", *words, "--bundle_token", quick=quick
    )
    found = {
        name: tensor
        for name, tensor in tensors_of(bundled).items()
        if name.startswith("bundle_emb")
    }
    assert_bit_equal(found, {f"bundle_emb.zyx.{name}": tensor for name, tensor in token.items()})
    with pytest.raises(OptionError, match=r"--train_token: .*--cache_text_encoder_outputs"):
        train_network(golden_model, images, tmp_path / "no", *words)


# ---------------------------------------------------------------------------------------------------- the page, and more


def test_the_example_of_the_page_runs(golden_model, images, tmp_path, monkeypatch):
    """As it is there, on small images and for a few steps."""
    import re
    import tomllib

    import sdxl_train_textual_inversion

    text = (ROOT / "docs" / "textual_inversion.md").read_text(encoding="utf-8")
    config = re.search(r"```toml\n(.*?)```", text, re.S)[1]
    assert tomllib.loads(config)["token_string"] == "mycat"
    for path in (images / "2_shapes").glob("*.txt"):
        path.write_text("a photo of mycat", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.toml").write_text(config, encoding="utf-8")
    (tmp_path / "sd_xl_base_1.0.safetensors").symlink_to(golden_model)
    small = [
        "--resolution",
        "64",
        "--bucket_reso_steps",
        "32",
        "--min_bucket_reso",
        "32",
        "--max_train_steps",
        "4",
        "--save_every_n_steps",
        "2",
    ]
    sdxl_train_textual_inversion.main(
        ["--config_file", "run.toml", *small, "--max_data_loader_n_workers", "0"]
    )
    assert tensors_of(tmp_path / "output" / "mycat.safetensors")["clip_g"].shape == (4, 128)
    assert (tmp_path / "output" / "mycat-step00000002-state" / "state.json").exists()


@pytest.mark.numeric
def test_it_learns_the_image_better_than_random_words_do(tmp_path):
    """By the loss of the one image that it was trained on, at fixed noises."""
    model, folder = tmp_path / "model.safetensors", tmp_path / "images" / "1_shape"
    make_tiny_sdxl.main(["--output", str(model)])
    make_images(folder, 1)
    next(folder.glob("*.txt")).write_text("a photo of zyx", encoding="utf-8")
    words = [
        "--token_string", "zyx", "--init_word", "thing", "--resolution", "64", "--cache_latents", "--max_train_steps", "40", "--learning_rate", "0.02",
        "--save_model_as", "safetensors", "--output_name", "lora", "--seed", "1", "--max_data_loader_n_workers", "0",
    ]  # fmt: skip
    trained = tensors_of(train(model, folder.parent, tmp_path / "out", quick=words))
    models = open_models(model)
    token = add_placeholder_token(models, "zyx", "thing", 1)
    tables = dict(zip(("clip_l", "clip_g"), token.tables, strict=True))
    pixels = torch.from_numpy(normalized(load(next(folder.glob("*.png")))))[None]
    pixels = torch.nn.functional.interpolate(pixels, size=(64, 64), mode="area")

    def loss_with(rows) -> float:
        for name, row in token.rows.items():
            row.data.copy_(rows[name])
        return loss_of_zyx(models, pixels)

    before = loss_of_zyx(models, pixels)
    others = []
    for i in range(5):
        rows = {}
        for name, table in tables.items():
            noise = torch.randn(1, table.weight.shape[1], generator=generator("word", i, name))
            rows[name] = (
                table.weight.mean(0) + table.weight.std(0) * noise
            )  # of the spread that the table's rows have
        others.append(loss_with(rows))
    assert loss_with(trained) < min(before, *others)


@torch.no_grad()
def loss_of_zyx(models, pixels) -> float:
    noise = torch.randn(32, 4, 8, 8, generator=generator("token_learns"))
    timesteps = torch.tensor((200, 400, 600, 800)).repeat(8)
    latents = scale_latents(models.encode_images(pixels, torch.zeros(1, 4, 8, 8)))
    text = TextConditioning.of(models.encode_texts(["a photo of zyx"], 75))
    size = torch.tensor([[64, 64]])
    vector = conditioning_vector(text.pooled, size, torch.zeros_like(size), size)
    noisy = add_noise(latents, noise, NoiseSchedule.sdxl().at(timesteps))
    predicted = models.unet(
        noisy, timesteps, text.context.expand(32, -1, -1), vector.expand(32, -1)
    )
    return (predicted - noise).square().mean().item()


@pytest.mark.long
def test_two_processes_train_the_word_of_one(golden_model, images, tmp_path):
    def run(count):
        out = tmp_path / str(count)
        files = [
            "--pretrained_model_name_or_path",
            golden_model,
            "--train_data_dir",
            images,
            "--output_dir",
            out,
        ]
        words = [
            "--max_train_steps",
            "3",
            "--gradient_accumulation_steps",
            2 // count,
            "--optimizer_type",
            "SGD",
        ]
        end_together(
            processes("sdxl_train_textual_inversion.py", *QUICK, *files, *words, count=count)
        )
        return tensors_of(out / "lora.safetensors")

    one, two = run(1), run(2)
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-5, atol=1e-6)
