"""--full_bf16, --full_fp16, --fused_backward_pass and the like through the scripts: results, resuming, refusals."""

import shutil
import sys

import pytest
import torch
from forked import end_together, processes
from messages import mentioning
from running import assert_bit_equal, losses_of, tensors_of, train_network
from test_fine_tune import QUICK, train

from library.device import lacks_bf16
from library.errors import OptionError, RunError

LAST_BLOCKS = ["--block_lr", ",".join(["0"] * 20 + ["1e-4"] * 3)]  # a short way back
BF16 = ["--mixed_precision", "bf16", "--full_bf16"]
ADAFACTOR = [
    "--optimizer_type",
    "Adafactor",
    "--optimizer_args",
    "scale_parameter=False",
    "relative_step=False",
    "warmup_init=False",
]
CASES = {
    "fused Adafactor in bf16, by the norm before": [
        *BF16,
        "--fused_backward_pass",
        "--fused_clip",
        "previous_norm",
        *ADAFACTOR,
        "--max_grad_norm",
        "0.01",
    ],
    "fused AdamW, by the norm before": [
        "--fused_backward_pass",
        "--fused_clip",
        "previous_norm",
        "--max_grad_norm",
        "0.01",
    ],
    "Kahan": [*BF16, "--rounding", "kahan"],
    "stochastic, schedule-free": [*BF16, "--optimizer_type", "AdamWScheduleFree"],
    "stochastic, all weights together": [*BF16, "--optimizer_type", "Prodigy"],
    "fused groups": ["--fused_optimizer_groups", "4"],
    "float16": ["--mixed_precision", "fp16", "--full_fp16"],
}


@pytest.mark.parametrize(
    "case",
    [
        name if name.startswith("fused AdamW") else pytest.param(name, marks=pytest.mark.long)
        for name in CASES
    ],
)
def test_resuming_is_bit_equal(case, golden_model, images, tmp_path):
    """Windows of two batches; the state is of step 2 of 4."""
    words = [
        *LAST_BLOCKS,
        *CASES[case],
        "--max_train_steps",
        "4",
        "--gradient_accumulation_steps",
        "2",
        "--save_state",
        "--save_every_n_steps",
        "2",
    ]
    if "Prodigy" in words:
        words[1] = words[1].replace("1e-4", "1")
    whole = train(golden_model, images, tmp_path / "whole", *words)
    shutil.copytree(
        tmp_path / "whole" / "lora-step00000002-state",
        tmp_path / "parts" / "lora-step00000002-state",
    )
    parts = train(golden_model, images, tmp_path / "parts", *words, "--auto_resume")
    assert_bit_equal(tensors_of(whole), tensors_of(parts))
    assert losses_of(tmp_path / "whole")[2:] == losses_of(tmp_path / "parts")
    before, after = tensors_of(golden_model), tensors_of(whole)
    changed = [
        name for name in after if not torch.equal(before[name].to(after[name].dtype), after[name])
    ]
    dtype = (
        torch.bfloat16 if BF16[2] in words else torch.float16 if "fp16" in words else torch.float32
    )
    assert changed and {after[name].dtype for name in changed} == {dtype}


@pytest.mark.long
@pytest.mark.parametrize("precision", [BF16, ["--mixed_precision", "fp16", "--full_fp16"]])
def test_a_network_is_trained_in_16_bits_too(precision, golden_model, images, tmp_path):
    path = train_network(
        golden_model,
        images,
        tmp_path / "out",
        "--max_train_steps",
        "3",
        *precision,
        "--network_dim",
        "4",
    )
    tensors = tensors_of(path)
    assert {
        tensor.dtype for name, tensor in tensors.items() if "lora_" in name.rpartition(".")[0][-12:]
    } <= {torch.bfloat16, torch.float16}
    assert any(
        tensor.abs().max() > 0
        for name, tensor in tensors.items()
        if name.endswith("lora_up.weight")
    )


@pytest.mark.long
def test_a_new_word_is_trained_in_16_bits_too(golden_model, images, tmp_path):
    """Its file is float32 unless told otherwise, with numbers of 16 bits."""
    import test_textual_inversion

    path = test_textual_inversion.train(
        golden_model, images, tmp_path / "out", *BF16, "--max_train_steps", "2", "--save_state"
    )
    for tensor in tensors_of(path).values():
        assert torch.equal(tensor, tensor.bfloat16().float()) and tensor.abs().max() > 0


@pytest.mark.long
def test_a_network_is_stepped_within_backward_too(golden_model, images, tmp_path):
    """Without clipping it ends where it does without, but for the order of sums."""
    words = ["--max_train_steps", "3", "--max_grad_norm", "0", "--learning_rate", "1e-4"]
    plain = train_network(golden_model, images, tmp_path / "plain", *words)
    fused = train_network(golden_model, images, tmp_path / "fused", *words, "--fused_backward_pass")
    one, two = tensors_of(plain), tensors_of(fused)
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=1e-6)


def test_fault_64_memory_that_runs_out_in_a_step_within_backward_ends_the_run_unsaved(
    golden_model, images, tmp_path, monkeypatch
):
    """Some weights are of this step then, others of the one before."""
    from library.training.optim.master_weights import MasterWeightOptimizer

    steps, step_params = [], MasterWeightOptimizer.step_params

    def limited(self, params, step, *others):
        steps.append(step)
        if steps.count(1) == 3:  # of the second optimizer step
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nmore")
        return step_params(self, params, step, *others)

    monkeypatch.setattr(MasterWeightOptimizer, "step_params", limited)
    with pytest.raises(
        RunError,
        match=r"step 2: out of memory .*some of its weights were stepped already.*the last saved state is whole",
    ):
        train(
            golden_model,
            images,
            tmp_path / "out",
            *LAST_BLOCKS,
            "--fused_backward_pass",
            "--max_train_steps",
            "3",
            "--train_batch_size",
            "2",
            "--save_state",
            "--save_every_n_steps",
            "1",
        )
    assert [path.name for path in (tmp_path / "out").glob("*-state")] == ["lora-step00000001-state"]


@pytest.mark.parametrize(
    "extra, tokens",
    [
        (["--full_bf16"], ["--full_bf16", "--mixed_precision", "bf16", "no"]),
        (["--full_fp16", "--mixed_precision", "bf16"], ["--full_fp16", "--mixed_precision", "fp16", "bf16"]),
        (["--rounding", "kahan"], ["--rounding", "kahan", "float32", "--full_bf16"]),
        (["--full_fp16", "--mixed_precision", "fp16", "--rounding", "stochastic"], ["--rounding", "stochastic", "--full_bf16", "--full_fp16", "kahan", "nearest"]),
        (["--fused_backward_pass", "--fused_optimizer_groups", "3"], ["--fused_backward_pass", "--fused_optimizer_groups"]),
        (["--fused_clip", "previous_norm"], ["--fused_clip", "--fused_backward_pass", "--fused_optimizer_groups"]),
        (["--fused_backward_pass", "--mixed_precision", "fp16"], ["--fused_backward_pass", "float16", "overflow", "--mixed_precision"]),
        (["--fused_backward_pass", "--optimizer_type", "Prodigy"], ["--fused_backward_pass", "--optimizer_type", "Prodigy", "--fused_optimizer_groups"]),
        (["--fused_backward_pass", "--optimizer_type", "pytorch_optimizer.Prodigy"], ["--fused_backward_pass", "pytorch_optimizer.Prodigy", "--fused_optimizer_groups"]),
    ],
)  # fmt: skip
def test_what_cant_work_is_refused(extra, tokens, golden_model, images, tmp_path):
    with pytest.raises(OptionError, match=mentioning(*tokens)):
        train(golden_model, images, tmp_path / "out", *extra, quick=QUICK)


def test_a_device_without_bfloat16_is_reported(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    sentence = lacks_bf16(torch.device("cuda"))
    assert "Tesla T4" in sentence and "7.5" in sentence
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    for is_supported, sentence in ((True, ""), (False, "this CPU has no bfloat16")):
        monkeypatch.setattr(
            torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda supported=is_supported: supported
        )
        assert lacks_bf16(torch.device("cpu")).startswith(sentence)
        assert bool(lacks_bf16(torch.device("cpu"))) == (not is_supported)


@pytest.mark.long
@pytest.mark.skipif(sys.platform == "win32", reason="new processes are forked")
def test_two_processes_round_alike(golden_model, images, tmp_path):
    """Each rounds all weights by itself; the run compares them after the first step and before it saves."""
    words = [
        *QUICK,
        *LAST_BLOCKS,
        *BF16,
        "--max_train_steps",
        "2",
        "--gradient_accumulation_steps",
        "2",
    ]
    files = [
        "--pretrained_model_name_or_path",
        golden_model,
        "--train_data_dir",
        images,
        "--output_dir",
        tmp_path / "out",
    ]
    end_together(processes("sdxl_train.py", *words, *files, count=2))
    assert (tmp_path / "out" / "lora.safetensors").exists()


@pytest.mark.long
def test_fine_tuning_with_the_optimizer_in_backward_gives_the_same_weights(
    golden_model, images, tmp_path
):
    """float32, no clipping, within 1e-6: encoders too, by Adafactor."""
    quick = [word for word in QUICK if word != "--cache_text_encoder_outputs"]
    words = [
        "--train_text_encoder",
        *ADAFACTOR,
        "--max_grad_norm",
        "0",
        "--max_train_steps",
        "2",
        "--learning_rate",
        "1e-5",
    ]
    plain = train(golden_model, images, tmp_path / "plain", *words, quick=quick)
    fused = train(
        golden_model, images, tmp_path / "fused", *words, "--fused_backward_pass", quick=quick
    )
    one, two = tensors_of(plain), tensors_of(fused)
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=1e-6, msg=name)
