"""The table of pairs: code and page agree, what is refused is refused before loading, and what isn't works."""

import itertools
import re

import pytest
from forked import end_together, processes
from running import ROOT, arguments, assert_bit_equal, losses_of, tensors_of, train_network
from test_fine_tune import QUICK, train
from tolerance import assert_trained

from library import param_group
from library.errors import OptionError
from library.training.options.compatibility import FEATURES, INCOMPATIBLE

WORDS = {
    "optimizer in backward": ["--fused_backward_pass"],
    "gradient accumulation": ["--gradient_accumulation_steps", "2"],
    "block swap": ["--blocks_to_swap", "9", "--gradient_checkpointing"],
    "optimizer offload": ["--optimizer_offload"],
    "activation offload": ["--cpu_offload_checkpointing", "--gradient_checkpointing"],
    "quantized base": ["--base_quant", "nf4"],
    "EMA": ["--ema_decay", "0.9"],
    "torch.compile": ["--torch_compile", "--dynamo_backend", "eager"],
}
ALONE = [
    pair
    for pair in itertools.combinations(FEATURES, 2)
    if pair not in INCOMPATIBLE and not {"DDP", "FSDP2"} & set(pair)
]
CHANGES_NOTHING = {"block swap", "optimizer offload", "activation offload"}


def test_the_docs_show_the_table():
    """docs/memory.md: a row and a column for each technique; "no" where a pair is refused."""
    text = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
    table = re.search(r"\| with \|(.*?)\n\n", text, re.DOTALL)
    assert table is not None
    columns, _, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in table[0].strip().splitlines()
    ]
    assert columns[1:] == list(FEATURES)
    shown = {
        (row[0], column): cell
        for row in rows
        for column, cell in zip(columns[1:], row[1:], strict=True)
    }
    for one, two in itertools.combinations(FEATURES, 2):
        assert shown[two, one] == ("no" if (one, two) in INCOMPATIBLE else "yes"), (one, two)


@pytest.mark.parametrize("pair", INCOMPATIBLE, ids=" and ".join)
def test_an_incompatible_pair_is_refused_with_its_reason(
    pair, golden_model, images, tmp_path, monkeypatch
):
    if "DDP" in pair:
        monkeypatch.setenv("WORLD_SIZE", "2")
    if "FSDP2" in pair:
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
        monkeypatch.setenv("FSDP_VERSION", "2")
    words = [word for one in pair for word in WORDS.get(one, [])]
    with pytest.raises(OptionError, match=re.escape(INCOMPATIBLE[pair])):
        train_network(golden_model, images, tmp_path / "out", *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.long
@pytest.mark.parametrize("pair", ALONE, ids=" and ".join)
def test_a_pair_works(pair, golden_model, images, tmp_path, monkeypatch):
    """Techniques that change nothing alone change nothing in a pair."""
    monkeypatch.setattr(param_group, "SMALL", 64)
    common = ["--max_train_steps", "2", "--mixed_precision", "bf16", "--max_grad_norm", "0"]
    run = train_network if "quantized base" in pair else train
    if run is train and "block swap" in pair and "optimizer in backward" not in pair:
        common.append("--fused_backward_pass")
    path = run(
        golden_model,
        images,
        tmp_path / "both",
        *common,
        *(word for one in pair for word in WORDS[one]),
    )
    assert (
        all(tensor.isfinite().all() for tensor in tensors_of(path).values())
        and len(losses_of(tmp_path / "both")) == 2
    )
    for one, other in (pair, pair[::-1]):
        if one in CHANGES_NOTHING:
            alone = run(golden_model, images, tmp_path / f"without {one}", *common, *WORDS[other])
            assert_bit_equal(tensors_of(alone), tensors_of(path))


@pytest.mark.long
def test_two_processes_with_all_that_goes_with_them_equal_one(golden_model, images, tmp_path):
    """Gradient accumulation, optimizer and activation offload, a quantized base, EMA."""
    words = ["--max_train_steps", "2", "--train_batch_size", "1", "--gradient_checkpointing"]
    for name in ("optimizer offload", "activation offload", "quantized base", "EMA"):
        words += [word for word in WORDS[name] if word not in words]
    train_network(
        golden_model, images, tmp_path / "one", *words, "--gradient_accumulation_steps", "4"
    )
    both = arguments(
        golden_model, images, tmp_path / "two", *words, "--gradient_accumulation_steps", "2"
    )
    end_together(processes("sdxl_train_network.py", *both, count=2))
    one, two = (tensors_of(tmp_path / name / "lora.safetensors") for name in ("one", "two"))
    assert_trained(two, one)


@pytest.mark.long
def test_a_process_that_a_launcher_starts_alone_steps_within_backward_once(
    golden_model, images, tmp_path
):
    """There is nobody to exchange gradients with, so nothing restores them after their step."""
    words = ["--max_train_steps", "2", "--fused_backward_pass"]
    plain = train(golden_model, images, tmp_path / "plain", *words)
    words += ["--pretrained_model_name_or_path", golden_model, "--train_data_dir", images]
    end_together(
        processes("sdxl_train.py", *QUICK, *words, "--output_dir", tmp_path / "alone", count=1)
    )
    assert losses_of(tmp_path / "alone", "grad_norm") == losses_of(tmp_path / "plain", "grad_norm")
    assert_bit_equal(tensors_of(plain), tensors_of(tmp_path / "alone" / "lora.safetensors"))
