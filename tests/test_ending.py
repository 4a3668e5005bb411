"""Fault 62: a run that is asked to end finishes its step, saves, and goes on later as if nothing had been."""

import os
import signal
import sys

import pytest
from forked import Script, processes, wait_until
from messages import mentions
from running import arguments, assert_bit_equal, losses_of, tensors_of, train_network

STEPS = ["--max_train_steps", "16", "--save_state", "--network_dropout", "0.1"]


def wait_for_steps(run, output, count):
    """Wait until the run's log has this number of steps."""
    wait_until(
        lambda: (output / "lora-log.jsonl").exists() and len(losses_of(output)) >= count, run
    )


@pytest.mark.parametrize(
    "number, status", [("SIGTERM", 143), pytest.param("SIGUSR1", 0, marks=pytest.mark.long)]
)
@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="signals of POSIX")
def test_fault_62_a_signal_ends_the_run_after_its_step_and_resuming_is_bit_equal(number, status, golden_model, images, tmp_path):  # fmt: skip
    out = tmp_path / "out"
    run = Script("sdxl_train_network.py", *arguments(golden_model, images, out, *STEPS))
    wait_for_steps(run, out, 3)
    os.kill(run.pid, getattr(signal, number))
    code, stderr = run.end()
    assert code == status, stderr[-3000:]
    assert mentions(stderr, number, "saving|save") and "Traceback" not in stderr
    done = len(losses_of(out))
    assert 3 <= done < 16
    assert (out / f"lora-step{done:08d}.safetensors").exists() and (
        out / f"lora-step{done:08d}-state"
    ).is_dir()
    if number == "SIGTERM":
        plain = train_network(golden_model, images, tmp_path / "plain", *STEPS)
        again = train_network(golden_model, images, out, *STEPS, "--auto_resume")
        assert_bit_equal(tensors_of(plain), tensors_of(again))
        assert losses_of(tmp_path / "plain") == losses_of(out)


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_fault_62_a_signal_to_one_of_two_processes_ends_both_at_the_same_step(
    golden_model, images, tmp_path
):
    out = tmp_path / "out"
    words = arguments(golden_model, images, out, "--max_train_steps", "400", "--save_state")
    runs = processes("sdxl_train_network.py", *words, count=2)
    wait_for_steps(runs[0], out, 3)
    os.kill(runs[1].pid, signal.SIGTERM)
    (one, stderr), (two, _) = (run.end() for run in runs)
    assert (one, two) == (0, 143), stderr[-3000:]
    done = len(losses_of(out))
    assert 3 <= done < 400 and (out / f"lora-step{done:08d}-state" / "state.json").exists(), stderr[
        -3000:
    ]
