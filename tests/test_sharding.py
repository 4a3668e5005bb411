"""FSDP2: two processes with a sharded U-Net do what one does. On a CPU with gloo, by torch's own fully_shard."""

import pytest
import torch
from running import QUICK as LORA
from running import ROOT, arguments, assert_bit_equal, losses_of, script, tensors_of
from test_fine_tune import QUICK, train

from library.errors import OptionError
from library.options import read_options
from library.training.options import COMMON_TRAINING
from library.training.processes import is_sharded_launch, start_processes
from library.training.sharding import refuse_with_shards
from library.training.task_options import FineTuneOptions

FSDP = {"ACCELERATE_USE_CPU": "true", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
FEW = ["--max_train_steps", "4", "--train_batch_size", "1", "--save_state", "--save_every_n_steps", "2"]

# As the script, but it also sees to it that what the forward meets is sharded.
CHECKED = """
import sys
from torch.distributed.tensor import DTensor
from library.errors import run
from library.models.unet import UNet
from library.training import loop
plain = loop._train
def start_checked(*args):
    made = start(*args)
    unet = next(module for module in made.update.step_module.held if isinstance(module, UNet))
    assert all(isinstance(parameter, DTensor) for parameter in unet.parameters()), "not sharded"
    print("sharded", sum(parameter.to_local().numel() for parameter in unet.parameters()), flush=True)
    return made
start, loop.start = loop.start, start_checked
import {name}
run(lambda: {name}.main(sys.argv[1:]))
"""


def torchrun(folder, name, words, *, port, env=FSDP):
    program = folder / "checked.py"
    program.write_text(CHECKED.format(name=name), encoding="utf-8")
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", 2, "--master_port", port, program]
    return script(*launch, *words, env=env, timeout=500)


def fine_tune_words(model, pictures, output, *extra):
    files = ["--pretrained_model_name_or_path", model, "--train_data_dir", pictures, "--output_dir", output]
    return [str(word) for word in [*QUICK, *files, *extra]]


def assert_close(one, two):
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=1e-4, msg=name)


@pytest.mark.long
def test_two_processes_with_a_sharded_unet_fine_tune_save_sample_and_resume_as_one_does(
    golden_model, pictures, tmp_path
):
    """Losses within 1e-5, whole files within 1e-4 of one process with twice the accumulation; resumed to the bit."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a circle --w 64 --h 64 --s 2\n", encoding="utf-8")
    extra = ["--sample_prompts", prompts, "--sample_every_n_steps", "4", "--optimizer_type", "AdamW"]
    train(golden_model, pictures, tmp_path / "one", *FEW, *extra, "--gradient_accumulation_steps", "2")
    words = fine_tune_words(golden_model, pictures, tmp_path / "two", *FEW, *extra)
    done = torchrun(tmp_path, "sdxl_train", words, port=29541)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("sharded") == 2
    assert losses_of(tmp_path / "two") == pytest.approx(losses_of(tmp_path / "one"), abs=1e-5)
    assert_close(tensors_of(tmp_path / "one" / "lora.safetensors"), tensors_of(tmp_path / "two" / "lora.safetensors"))
    assert len(list((tmp_path / "two" / "sample").glob("*.png"))) == len(
        list((tmp_path / "one" / "sample").glob("*.png"))
    )
    state = "lora-step00000002-state"
    assert_close(
        tensors_of(tmp_path / "one" / state / "optimizer.safetensors"),
        tensors_of(tmp_path / "two" / state / "optimizer.safetensors"),
    )
    words = fine_tune_words(
        golden_model, pictures, tmp_path / "again", *FEW, *extra, "--resume", tmp_path / "two" / state
    )
    done = torchrun(tmp_path, "sdxl_train", words, port=29542)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_bit_equal(
        tensors_of(tmp_path / "two" / "lora.safetensors"), tensors_of(tmp_path / "again" / "lora.safetensors")
    )


@pytest.mark.long
def test_a_network_beside_a_sharded_frozen_unet_learns_as_on_one_process(golden_model, pictures, tmp_path):
    from running import train_network

    few = ["--max_train_steps", "4", "--train_batch_size", "1"]
    train_network(golden_model, pictures, tmp_path / "one", *few, "--gradient_accumulation_steps", "2")
    words = arguments(golden_model, pictures, tmp_path / "two", *few, quick=LORA)
    done = torchrun(tmp_path, "sdxl_train_network", words, port=29543)
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses_of(tmp_path / "two") == pytest.approx(losses_of(tmp_path / "one"), abs=1e-5)
    assert_close(tensors_of(tmp_path / "one" / "lora.safetensors"), tensors_of(tmp_path / "two" / "lora.safetensors"))


# ----------------------------------------------------------------------------------------------------------- what is asked for


@pytest.fixture
def launched(monkeypatch):
    """Sets the environment that `accelerate launch` makes of a configuration."""
    return lambda **variables: [monkeypatch.setenv(name, value) for name, value in {**FSDP, **variables}.items()]


@pytest.mark.parametrize(
    "variables, expected",
    [({"FSDP_VERSION": "1"}, "FSDP 1; take fsdp_version: 2"), ({"FSDP_OFFLOAD_PARAMS": "true"}, "set it to false")],
)
def test_what_fsdp2_here_cant_do_is_refused(variables, expected, launched):
    launched(**variables)
    with pytest.raises(OptionError, match=expected):
        is_sharded_launch()


def test_one_process_alone_cant_shard(launched):
    launched()
    assert is_sharded_launch()
    with pytest.raises(OptionError, match="FSDP is for several processes"):
        start_processes()


@pytest.mark.parametrize("name, kind, is_sharded", [("ddp", "MULTI_GPU", False), ("fsdp2", "FSDP", True)])
def test_the_configurations_are_accelerates_and_ask_for_what_they_say(name, kind, is_sharded, monkeypatch):
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    words = ["--config_file", str(ROOT / "configs" / "accelerate" / f"{name}.yaml"), "script.py"]
    filled, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    assert (filled.use_fsdp, filled.multi_gpu, filled.num_processes) == (kind == "FSDP", kind == "MULTI_GPU", 2)
    for key, value in prepare_multi_gpu_env(filled).items():
        monkeypatch.setenv(key, value)
    assert is_sharded_launch() == is_sharded


def test_what_cant_go_with_a_sharded_unet_is_refused_by_name():
    words = ["--pretrained_model_name_or_path", "x", "--train_data_dir", "x", "--output_dir", "x", "--torch_compile"]
    words += ["--ema_decay", "0.9", "--optimizer_type", "Adafactor"]
    options = read_options(None, [*COMMON_TRAINING, FineTuneOptions], words)
    with pytest.raises(OptionError) as frozen:
        refuse_with_shards(options, trains_unet=False)
    assert [mistake.text.split(" can't")[0] for mistake in frozen.value.mistakes] == ["--torch_compile"]
    with pytest.raises(OptionError) as trained:
        refuse_with_shards(options, trains_unet=True)
    told = [mistake.text.split(" can't")[0] for mistake in trained.value.mistakes]
    assert told[1] == "--ema_decay" and told[2].startswith("--optimizer_type Adafactor") and len(told) == 3
