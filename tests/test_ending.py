"""Fault 62: a run that is asked to end finishes its step, saves, and goes on later as if nothing had been."""

import os
import signal
import subprocess
import sys
import time

import pytest
from running import ROOT, arguments, assert_bit_equal, losses_of, tensors_of, train_network

STEPS = ["--max_train_steps", "24", "--save_state", "--network_dropout", "0.1"]


def start(words, *launch):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, *launch, str(ROOT / "sdxl_train_network.py"), *words]
    return subprocess.Popen(command, env=env, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)


def wait_for_steps(run, output, count):
    """Until so many steps are in the run's log."""
    deadline = time.monotonic() + 120
    while not (output / "lora-log.jsonl").exists() or len(losses_of(output)) < count:
        assert run.poll() is None and time.monotonic() < deadline, run.stderr.read()[-3000:]
        time.sleep(0.02)


@pytest.mark.parametrize("number, status", [("SIGTERM", 143), pytest.param("SIGUSR1", 0, marks=pytest.mark.long)])
@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="signals of POSIX")
def test_fault_62_a_signal_ends_the_run_after_its_step_and_resuming_is_bit_equal(number, status, golden_model, pictures, tmp_path):  # fmt: skip
    out = tmp_path / "out"
    run = start(arguments(golden_model, pictures, out, *STEPS))
    wait_for_steps(run, out, 3)
    os.kill(run.pid, getattr(signal, number))
    told = run.communicate(timeout=60)[1]
    assert run.returncode == status, told[-3000:]
    assert f"{number}: finishing the step, then saving" in told and "Traceback" not in told
    done = len(losses_of(out))
    assert 3 <= done < 24
    assert (out / f"lora-step{done:08d}.safetensors").exists() and (out / f"lora-step{done:08d}-state").is_dir()
    if number == "SIGTERM":
        plain = train_network(golden_model, pictures, tmp_path / "plain", *STEPS)
        again = train_network(golden_model, pictures, out, *STEPS, "--auto_resume")
        assert_bit_equal(tensors_of(plain), tensors_of(again))
        assert losses_of(tmp_path / "plain") == losses_of(out)


@pytest.mark.skipif(sys.platform == "win32", reason="torchrun's signals")
def test_fault_62_two_processes_end_at_the_same_step(golden_model, pictures, tmp_path):
    out = tmp_path / "out"
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29617"]
    run = start(arguments(golden_model, pictures, out, "--max_train_steps", "400", "--save_state"), *launch)
    wait_for_steps(run, out, 3)
    os.killpg(run.pid, signal.SIGTERM)
    told = run.communicate(timeout=90)[1]
    assert "finishing the step" in told
    done = len(losses_of(out))
    assert 3 <= done < 400 and (out / f"lora-step{done:08d}-state" / "state.json").exists(), told[-3000:]
