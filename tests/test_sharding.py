"""FSDP2 and ZeRO: two processes with a sharded U-Net do what one does, on a CPU with gloo and torch's fully_shard."""

import pytest
import test_control_net_training as lllite
import test_textual_inversion as inversion
import torch
from forked import free_port
from messages import mentioning, mentions
from running import QUICK as LORA
from running import ROOT, arguments, assert_bit_equal, losses_of, script, tensors_of, train_network
from test_fine_tune import QUICK, TEXT_TOO, train

from library.errors import OptionError
from library.options import read_options
from library.training.options.compatibility import COMMON_TRAINING, check_pairs
from library.training.options.distributed import (
    ShardingConfig,
    ShardingOptions,
    check_sharding,
    sharding_config,
    sharding_notices,
)
from library.training.options.tasks import FineTuneOptions, check_fine_tune
from tools.make_tiny_dataset import make_images

CPU = {"ACCELERATE_USE_CPU": "true"}
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true"}
FEW = [
    "--max_train_steps",
    "4",
    "--train_batch_size",
    "1",
    "--save_state",
    "--save_every_n_steps",
    "2",
]

# The script, which also checks that the U-Net is sharded when the forward starts, and prints whether the first block is gathered while
# the last one computes, and how many averaged gradients the U-Net holds after each backward.
CHECKED = """
import sys
from torch.distributed.tensor import DTensor
from library.errors import run
from library.models.unet import UNet
from library.training import main as training
def print_line(*words):
    sys.stdout.write(" ".join(map(str, words)) + "\\n")  # one write, as two processes share the stream
def is_sharded(module):
    return all(isinstance(parameter, DTensor) for parameter in module.parameters())
def build_checked(*args):
    built = build_run(*args)
    optimizer_step = built.optimizer_step
    unet = next(module for module in optimizer_step.loss_module.modules() if isinstance(module, UNet))
    assert is_sharded(unet), "not sharded"
    first, last = unet.input_blocks[1][0], unet.output_blocks[-1]
    def print_first_block(*_):
        print_line("sharded" if is_sharded(first) else "gathered")
        hook.remove()
    def check_sharded(*_):
        if is_first_microbatch and not is_sharded(first):
            print_line("still gathered")
    hook = last.register_forward_hook(print_first_block)
    unet.register_forward_pre_hook(check_sharded)
    is_first_microbatch, parameters, backward = True, list(unet.parameters()), optimizer_step.backward
    def backward_and_print(losses, position):
        nonlocal is_first_microbatch
        backward(losses, position)
        is_first_microbatch = position.is_last_microbatch
        count = sum(parameter.grad is not None for parameter in parameters)
        print_line("last micro-batch:" if is_first_microbatch else "micro-batch:", count)
    optimizer_step.backward = backward_and_print
    return built
build_run, training.build_run = training.build_run, build_checked
import {name}
run(lambda: {name}.main(sys.argv[1:]))
"""


def torchrun(folder, name, words, *, env=FSDP):
    program = folder / "checked.py"
    program.write_text(CHECKED.format(name=name), encoding="utf-8")
    launch = [
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        2,
        "--master_port",
        free_port(),
        program,
    ]
    done = script(*launch, *words, env={**CPU, **env}, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "still gathered" not in done.stdout, "after a step, a sample or a validation"
    return done.stdout


def fine_tune_words(model, images, output, *extra, quick=QUICK):
    files = [
        "--pretrained_model_name_or_path",
        model,
        "--train_data_dir",
        images,
        "--output_dir",
        output,
    ]
    return [str(word) for word in [*quick, *files, *extra]]


def assert_close(one, two):
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=1e-4, msg=name)


@pytest.fixture(scope="module")
def alone(golden_model, tmp_path_factory):
    """The run of one process with twice the accumulation, its images, and the words of the other runs."""
    folder = tmp_path_factory.mktemp("alone")
    make_images(folder / "pictures" / "2_shapes", 4)
    prompts = folder / "prompts.txt"
    prompts.write_text("a circle --w 64 --h 64 --s 2\n", encoding="utf-8")
    words = [
        *FEW,
        "--sample_prompts",
        prompts,
        "--sample_every_n_steps",
        "2",
        "--optimizer_type",
        "AdamW",
    ]
    train(
        golden_model,
        folder / "pictures",
        folder / "one",
        *words,
        "--gradient_accumulation_steps",
        "2",
    )
    return folder / "one", folder / "pictures", words


@pytest.mark.long
@pytest.mark.parametrize(
    "env, words, is_gathered",
    [
        pytest.param(FSDP, [], False, id="FSDP2"),
        pytest.param(
            {},
            ["--deepspeed", "--zero_stage", "2", "--offload_optimizer_device", "cpu"],
            True,
            id="ZeRO-2",
        ),
        pytest.param(
            {},
            ["--deepspeed", "--zero_stage", "3", "--offload_param_device", "cpu"],
            False,
            id="ZeRO-3",
        ),
    ],
)
def test_two_processes_with_a_sharded_unet_fine_tune_save_sample_and_resume_as_one_does(
    env, words, is_gathered, alone, golden_model, tmp_path
):
    """Losses within 1e-5, complete files within 1e-4 of one process with twice the accumulation; resumed bit for bit."""
    (one, images, alone_words), two = alone, tmp_path / "two"
    lines = torchrun(
        tmp_path,
        "sdxl_train",
        fine_tune_words(golden_model, images, two, *alone_words, *words),
        env=env,
    )
    lines = lines.splitlines()
    expected = "gathered" if is_gathered else "sharded"
    assert lines.count(expected) == 2 and lines.count("gathered") + lines.count("sharded") == 2, (
        lines
    )
    assert losses_of(two) == pytest.approx(losses_of(one), abs=1e-5)
    assert_close(tensors_of(one / "lora.safetensors"), tensors_of(two / "lora.safetensors"))
    assert len(list((two / "sample").glob("*.png"))) == len(list((one / "sample").glob("*.png")))
    state = "lora-step00000002-state"
    assert_close(
        tensors_of(one / state / "optimizer.safetensors"),
        tensors_of(two / state / "optimizer.safetensors"),
    )
    again = fine_tune_words(
        golden_model, images, tmp_path / "again", *alone_words, *words, "--resume", two / state
    )
    torchrun(tmp_path, "sdxl_train", again, env=env)
    assert_bit_equal(
        tensors_of(two / "lora.safetensors"), tensors_of(tmp_path / "again" / "lora.safetensors")
    )


@pytest.mark.long
@pytest.mark.parametrize(
    "steps, zero, counts",
    [
        pytest.param(
            [],
            ["--zero_stage", "1"],
            ["micro-batch: 0", "last micro-batch: 620"],
            id="after backward, reduced once",
        ),
        pytest.param(
            [],
            ["--zero_stage", "2"],
            ["micro-batch: 620", "last micro-batch: 620"],
            id="after backward, reduced by micro-batch",
        ),
        pytest.param(
            # Adam would make steps of the noise that is the gradient of an encoder's keys.
            [
                "--fused_backward_pass",
                "--train_text_encoder",
                "--optimizer_type",
                "SGD",
                "--learning_rate",
                "0.1",
            ],
            ["--zero_stage", "3", "--offload_param_device", "cpu"],
            ["micro-batch: 620", "last micro-batch: 0"],
            id="in backward",
        ),
        pytest.param(
            ["--fused_optimizer_groups", "4", "--fused_clip", "previous_norm"],
            ["--zero_stage", "2", "--offload_param_device", "cpu"],
            ["micro-batch: 620", "last micro-batch: 0"],
            id="in backward, clipped by the previous norm",
        ),
    ],
)
def test_accumulation_of_sharded_gradients_and_steps_in_backward_are_those_of_one_process(
    steps, zero, counts, golden_model, images, tmp_path
):
    """Gradients are averaged once per step or per micro-batch, and stepped after backward, or in the last one, which frees them."""
    words = ["--max_train_steps", "2", "--train_batch_size", "1", "--max_grad_norm", "0.1", *steps]
    quick = TEXT_TOO if "--train_text_encoder" in steps else QUICK
    train(
        golden_model,
        images,
        tmp_path / "one",
        *words,
        "--gradient_accumulation_steps",
        "4",
        quick=quick,
    )
    words += ["--gradient_accumulation_steps", "2", "--deepspeed", *zero]
    words = fine_tune_words(golden_model, images, tmp_path / "two", *words, quick=quick)
    lines = torchrun(tmp_path, "sdxl_train", words, env={}).splitlines()
    assert [lines.count(line) for line in counts] == [4, 4], lines
    for name in ("loss/current", "grad_norm"):
        one, two = (losses_of(tmp_path / folder, name) for folder in ("one", "two"))
        assert two == pytest.approx(one, rel=1e-5, abs=1e-5)
    assert_close(
        tensors_of(tmp_path / "one" / "lora.safetensors"),
        tensors_of(tmp_path / "two" / "lora.safetensors"),
    )


@pytest.mark.long
def test_a_network_on_a_sharded_frozen_unet_learns_as_on_one_process(
    golden_model, images, tmp_path
):
    """ZeRO-3 with the U-Net's weights and the optimizer's state in RAM."""
    few = ["--max_train_steps", "4", "--train_batch_size", "1"]
    zero = [
        "--deepspeed",
        "--zero_stage",
        "3",
        "--offload_param_device",
        "cpu",
        "--offload_optimizer_device",
        "cpu",
    ]
    train_network(
        golden_model, images, tmp_path / "one", *few, "--gradient_accumulation_steps", "2"
    )
    words = arguments(golden_model, images, tmp_path / "two", *few, *zero, quick=LORA)
    assert (
        torchrun(tmp_path, "sdxl_train_network", words, env={}).splitlines().count("sharded") == 2
    )
    assert losses_of(tmp_path / "two") == pytest.approx(losses_of(tmp_path / "one"), abs=1e-5)
    assert_close(
        tensors_of(tmp_path / "one" / "lora.safetensors"),
        tensors_of(tmp_path / "two" / "lora.safetensors"),
    )


@pytest.mark.long
def test_a_control_net_on_a_sharded_unet_learns_as_on_one_process(golden_model, images, tmp_path):
    """The images are their own conditions. A bias that moves all keys alike has a gradient of noise, and is left out."""
    few = ["--train_batch_size", "1", "--conditioning_data_dir", images / "2_shapes"]
    lllite.train(
        golden_model, images, None, tmp_path / "one", *few, "--gradient_accumulation_steps", "2"
    )
    words = fine_tune_words(
        golden_model, images, tmp_path / "two", *few, "--output_name", "lora", quick=lllite.QUICK
    )
    assert (
        torchrun(tmp_path, "sdxl_train_control_net_lllite", words).splitlines().count("sharded")
        == 2
    )
    assert losses_of(tmp_path / "two") == pytest.approx(losses_of(tmp_path / "one"), abs=1e-5)
    two, one = (tensors_of(tmp_path / folder / "lora.safetensors") for folder in ("two", "one"))
    noise = {name for name in one if name.endswith("attn1_to_k.up.0.bias")}
    assert_close(
        *({name: tensors[name] for name in tensors.keys() - noise} for tensors in (one, two))
    )


@pytest.mark.long
def test_a_placeholder_token_with_a_sharded_unet_learns_as_on_one_process(
    golden_model, images, tmp_path
):
    few = ["--max_train_steps", "3", "--train_batch_size", "1", "--optimizer_type", "SGD"]
    inversion.train(
        golden_model, images, tmp_path / "one", *few, "--gradient_accumulation_steps", "2"
    )
    words = fine_tune_words(golden_model, images, tmp_path / "two", *few, quick=inversion.QUICK)
    assert (
        torchrun(tmp_path, "sdxl_train_textual_inversion", words).splitlines().count("sharded") == 2
    )
    assert losses_of(tmp_path / "two") == pytest.approx(losses_of(tmp_path / "one"), abs=1e-5)
    assert_close(
        tensors_of(tmp_path / "one" / "lora.safetensors"),
        tensors_of(tmp_path / "two" / "lora.safetensors"),
    )


# The second process fails after its first step, while the first one waits for it in the next forward.
FAILS = """
import os, sys
from library.errors import run
from library.training import loop
def fail(*_):
    if os.environ["RANK"] == "1":
        raise RuntimeError("this process fails")
loop.after_step = fail
import sdxl_train
run(lambda: sdxl_train.main(sys.argv[1:]))
"""


@pytest.mark.long
@pytest.mark.parametrize("zero", [[], ["--deepspeed", "--zero_stage", "3"]], ids=["DDP", "ZeRO-3"])
def test_a_process_that_fails_ends_all_processes(zero, golden_model, images, tmp_path):
    """torchrun stops the others, wherever they wait; the error is printed, and nothing is saved."""
    program = tmp_path / "fails.py"
    program.write_text(FAILS, encoding="utf-8")
    words = fine_tune_words(golden_model, images, tmp_path / "out", "--max_train_steps", "4", *zero)
    launch = [
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        2,
        "--master_port",
        free_port(),
        program,
    ]
    done = script(*launch, *words, env=CPU, timeout=300)
    assert done.returncode == 1 and "RuntimeError: this process fails" in done.stderr
    assert (
        not list((tmp_path / "out").glob("*.safetensors")) and len(losses_of(tmp_path / "out")) <= 1
    )


# ----------------------------------------------------------------------------------------------------------- what is asked for


@pytest.fixture
def launched(monkeypatch):
    """Sets the environment that `accelerate launch` makes of a configuration."""
    return lambda variables: [monkeypatch.setenv(name, value) for name, value in variables.items()]


def asked(*words):
    """The options of a fine-tuning."""
    paths = ["--pretrained_model_name_or_path", "x", "--train_data_dir", "x", "--output_dir", "x"]
    return read_options(None, [*COMMON_TRAINING, FineTuneOptions], [*paths, *words])


@pytest.mark.parametrize(
    "words, expected",
    [
        ([], ShardingConfig(0)),
        (["--deepspeed"], ShardingConfig(2)),
        (
            ["--deepspeed", "--zero_stage", "1", "--offload_optimizer_device", "cpu"],
            ShardingConfig(1, False, True),
        ),
        (
            ["--deepspeed", "--zero_stage", "3", "--offload_param_device", "cpu"],
            ShardingConfig(3, True, False),
        ),
        (["--zero_stage", "3"], ShardingConfig(0)),
    ],
)
def test_options_choose_a_stage(words, expected):
    assert sharding_config(asked(*words)[ShardingOptions]) == expected


@pytest.mark.parametrize(
    "variables, expected",
    [
        (FSDP, ShardingConfig(3)),
        (
            {**FSDP, "FSDP_RESHARD_AFTER_FORWARD": "false", "FSDP_OFFLOAD_PARAMS": "true"},
            ShardingConfig(2, True, False),
        ),
        (DEEPSPEED, ShardingConfig(2)),
        ({**DEEPSPEED, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"}, ShardingConfig(0)),
        (
            {
                **DEEPSPEED,
                "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
                "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu",
                "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu",
            },
            ShardingConfig(3, True, True),
        ),
    ],
)
def test_accelerates_configuration_chooses_a_stage(variables, expected, launched):
    launched(variables)
    options = asked()
    assert sharding_config(options[ShardingOptions]) == expected and not list(
        check_sharding(options[ShardingOptions])
    )


@pytest.mark.parametrize(
    "variables, words, tokens",
    [
        ({**FSDP, "FSDP_VERSION": "1"}, [], ["fsdp_version", "1", "2"]),
        (
            {**FSDP, "FSDP_RESHARD_AFTER_FORWARD": "SHARD_GRAD_OP"},
            [],
            ["fsdp_reshard_after_forward", "shard_grad_op", "true"],
        ),
        (
            {**DEEPSPEED, "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "nvme"},
            [],
            ["offload_param_device", "nvme"],
        ),
        ({**DEEPSPEED, "ACCELERATE_DEEPSPEED_CONFIG_FILE": "ds.json"}, [], ["ds.json"]),
        (FSDP, ["--deepspeed"], ["--zero_stage", "2", "ZeRO-2", "FSDP", "ZeRO-3"]),
    ],
)
def test_unsupported_configurations_are_refused(variables, words, tokens, launched):
    launched(variables)
    (mistake,) = check_sharding(asked(*words)[ShardingOptions])
    assert mentions(mistake.text, *tokens)


@pytest.mark.parametrize(
    "words, tokens",
    [
        (["--offload_param_device", "cpu"], ["--offload_param_device", "--deepspeed"]),
        (
            ["--deepspeed", "--offload_optimizer_device", "nvme"],
            ["--offload_optimizer_device", "nvme", "cpu"],
        ),
        (
            ["--deepspeed", "--zero_stage", "0", "--offload_param_device", "cpu"],
            ["--offload_param_device", "--zero_stage", "1"],
        ),
        (
            ["--deepspeed", "--zero_stage", "0", "--offload_optimizer_device", "cpu"],
            ["--offload_optimizer_device", "--zero_stage", "1"],
        ),
    ],
)
def test_contradictory_options_are_refused(words, tokens):
    with pytest.raises(OptionError, match=mentioning(*tokens)):
        asked(*words)


def test_settings_without_effect_are_reported(launched):
    launched(
        {**DEEPSPEED, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "1", "ACCELERATE_GRADIENT_CLIPPING": "0.5"}
    )
    options = asked("--zero_stage", "3")[ShardingOptions]
    notices = list(
        sharding_notices(
            options, zero_stage_source="--zero_stage", accumulation=1, max_grad_norm=1.0
        )
    )
    assert [line.split(" ")[0] for line in notices] == ["--zero_stage", "accelerate's"]
    assert "says 0.5 where --max_grad_norm decides, which is 1" in notices[1]


@pytest.mark.parametrize(
    "name, processes_are, stage", [("ddp", "MULTI_GPU", 0), ("fsdp2", "FSDP", 3), ("zero2", "FSDP", 2), ("zero3", "FSDP", 3)]
)  # fmt: skip
def test_the_example_configurations_are_valid_and_ask_for_their_stage(
    name, processes_are, stage, launched
):
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    words = ["--config_file", str(ROOT / "configs" / "accelerate" / f"{name}.yaml"), "script.py"]
    filled, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    assert not filled.use_deepspeed and filled.num_processes == 2
    assert (filled.use_fsdp, filled.multi_gpu) == (
        processes_are == "FSDP",
        processes_are == "MULTI_GPU",
    )
    launched(prepare_multi_gpu_env(filled))
    options = asked()
    assert sharding_config(options[ShardingOptions]) == ShardingConfig(stage) and not list(
        check_sharding(options[ShardingOptions])
    )


def test_features_incompatible_with_sharding_are_refused_by_name(launched):
    options = asked(
        "--deepspeed",
        "--ema_decay",
        "0.9",
        "--optimizer_type",
        "Adafactor",
        "--memory_plan",
        "auto",
    )
    features = [mistake.text.split(" ", 1)[0] for mistake in check_pairs(options)]
    assert features == ["FSDP", "--memory_plan"], "a single process, and a plan for one GPU"
    launched({"WORLD_SIZE": "2"})
    assert [mistake.about for mistake in check_pairs(options)] == [("memory_plan",)]
    trained = [mistake.text.split(" can't")[0] for mistake in check_fine_tune(options)]
    assert (
        trained[0] == "--ema_decay"
        and trained[1].startswith("--optimizer_type Adafactor")
        and len(trained) == 2
    )
