"""Trackers: what TensorBoard and wandb are sent, and that neither can end a run or give a key away."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from messages import lines_mentioning, mentioning, mentions
from running import ROOT

from library.errors import OptionError
from library.log import log
from library.options import ConfigOptions, read_options
from library.training.monitoring import trackers
from library.training.monitoring.trackers import (
    Trackers,
    logged_config,
    open_trackers,
    read_tracker_config,
)
from library.training.options.compatibility import COMMON_TRAINING
from library.training.options.output import TrackerOptions
from networks.options import NetworkOptions

KEY = "0123456789" * 4
IMAGES = [("a cat", np.full((8, 8, 3), 200, np.uint8)), ("a dog", np.full((8, 8, 3), 20, np.uint8))]


@pytest.fixture(autouse=True)
def records(caplog, monkeypatch):
    """The records of our log, be it that another test has started it."""
    monkeypatch.setattr(log, "propagate", True)
    caplog.set_level(logging.INFO, logger="library")
    return caplog


def warnings_of(records) -> list[str]:
    return [record.getMessage() for record in records.records if record.levelname == "WARNING"]


def events_of(folder: Path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder))
    events.Reload()
    return events


class FakeRun:
    """As much of a wandb run as is used, with wandb's rule that what is older than the last step is dropped."""

    url, dir, disabled = "https://wandb.example/run", "logs/wandb/run-1/files", False

    def __init__(self):
        self.rows, self.exit_code, self.fails_at = [], None, ""

    def log(self, values, step):
        if self.fails_at == "log":
            raise ConnectionError(f"the server refuses {KEY}\nand more")
        assert not self.rows or step >= self.rows[-1][0]
        self.rows.append((step, values))

    def finish(self, exit_code):
        self.exit_code = exit_code
        if self.fails_at == "finish":
            raise TimeoutError("Timed out finishing run.")


@pytest.fixture
def wandb(monkeypatch):
    """A wandb that records its calls."""
    fake = SimpleNamespace(run=FakeRun(), arguments={}, error=None)

    def init(project=None, name=None, dir=None, config=None, tags=None, settings=None):
        if fake.error is not None:
            raise fake.error
        fake.arguments = {
            "project": project,
            "name": name,
            "dir": dir,
            "config": config,
            "tags": tags,
            "settings": settings,
        }
        return fake.run

    module = SimpleNamespace(
        init=init,
        setup=lambda settings: None,
        Settings=dict,
        Image=lambda pixels, caption: (caption, pixels.shape),
    )
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    return fake


class Recorder:
    """A tracker that remembers, or raises from a given call on."""

    def __init__(self, fails_at: str = ""):
        self.calls, self.fails_at = [], fails_at

    def log(self, values, step, epoch):
        self._called("log")

    def images(self, images, step):
        self._called("images")

    def close(self):
        self._called("close")

    def _called(self, name):
        self.calls.append(name)
        if name == self.fails_at:
            raise OSError(28, f"No space left on device, key {KEY}")


# ------------------------------------------------------------------------------------------------------------ TensorBoard


def test_tensorboard_keeps_scalars_by_step_or_epoch_and_images_and_config(tmp_path):
    options = TrackerOptions(logging_dir=tmp_path, log_prefix="p-", log_tracker_name="mine")
    sent = open_trackers(options, "network_train", {"seed": 7})
    sent.log({"loss/current": 0.5, "lr/unet": 1e-4}, 10)
    sent.log({"loss/current": 0.25}, 20)
    sent.log({"loss/epoch_average": 0.375}, 20, epoch=1)
    sent.images(IMAGES, 20)
    sent.close()
    (run,) = tmp_path.glob("p-" + "[0-9]" * 14)
    events = events_of(run / "mine")
    assert [(event.step, event.value) for event in events.Scalars("loss/current")] == [
        (10, 0.5),
        (20, 0.25),
    ]
    assert [(event.step, event.value) for event in events.Scalars("loss/epoch_average")] == [
        (1, 0.375)
    ]
    assert set(events.Tags()["images"]) == {"sample/0", "sample/1"}
    assert events.Images("sample/0")[0].step == 20 and events.Images("sample/0")[0].width == 8
    (config,) = events.Tensors("config/text_summary")
    assert '"seed": 7' in config.tensor_proto.string_val[0].decode()


def test_fault_71_runs_of_the_same_second_get_different_folders(tmp_path, monkeypatch):
    monkeypatch.setattr(trackers.time, "strftime", lambda *_: "20260102030405")
    for loss in (1.0, 2.0, 3.0):
        sent = open_trackers(TrackerOptions(logging_dir=tmp_path / "logs"), "network_train", {})
        sent.log({"loss": loss}, 1)
        sent.close()
    folders = [tmp_path / "logs" / f"20260102030405{end}" for end in ("", "-2", "-3")]
    assert sorted((tmp_path / "logs").iterdir()) == folders
    assert [events_of(folder / "network_train").Scalars("loss")[0].value for folder in folders] == [
        1.0,
        2.0,
        3.0,
    ]


def test_a_logging_dir_that_cannot_be_created_is_an_error_before_the_run(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "unmounted").symlink_to(tmp_path / "nowhere" / "disk")
    for folder in (tmp_path / "file", tmp_path / "unmounted"):
        with pytest.raises(OptionError, match=mentioning("--logging_dir", folder, "File exists")):
            open_trackers(TrackerOptions(logging_dir=folder), "network_train", {})


@pytest.mark.parametrize(
    "name, hidden", [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")]
)
def test_a_missing_package_is_named_with_flag_and_pip_command(name, hidden, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, hidden, None)
    with pytest.raises(OptionError, match=mentioning("--log_with", name, f"pip install {name}")):
        open_trackers(TrackerOptions(logging_dir=tmp_path, log_with=name), "network_train", {})


def test_only_the_named_trackers_are_imported(tmp_path):
    program = f"""
        import sys
        from pathlib import Path
        import library.training.monitoring.trackers as trackers
        assert not {{"torch", "numpy", "tensorboard", "wandb"}} & sys.modules.keys()
        trackers.open_trackers(trackers.TrackerOptions(), "x", {{}}).log({{"loss": 1.0}}, 1)
        trackers.open_trackers(trackers.TrackerOptions(logging_dir=Path({str(tmp_path)!r})), "x", {{}}).close()
        assert "wandb" not in sys.modules
    """
    program = "\n".join(line.strip() for line in program.splitlines())
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------------------------------------------------------- failing


@pytest.mark.parametrize("fails_at, called", [("log", 1), ("images", 3), ("close", 4)])
def test_fault_70_a_tracker_that_raises_is_logged_once_and_the_others_continue(
    fails_at, called, records
):
    broken, whole = Recorder(fails_at), Recorder()
    sent = Trackers({"broken": broken, "whole": whole}, [KEY])
    sent.log({"loss": 1.0}, 1)
    sent.log({"loss": 1.0}, 2)
    sent.images(IMAGES, 2)
    sent.close()
    assert whole.calls == ["log", "log", "images", "close"] and len(broken.calls) == called
    (text,) = warnings_of(records)
    assert mentions(text, "broken", "OSError: [Errno 28] No space left on device, key ***")


def test_the_users_interrupt_passes_through():
    def interrupted(*arguments):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Trackers({"fake": SimpleNamespace(log=interrupted)}).log({"loss": 1.0}, 1)


@pytest.mark.skipif(
    sys.platform == "win32", reason="a limit on file sizes stands for the full disk"
)
def test_fault_70_a_full_disk_of_tensorboard_does_not_end_the_run(tmp_path):
    program = f"""
        import resource, signal
        from pathlib import Path
        from library.training.monitoring.trackers import TrackerOptions, open_trackers
        sent = open_trackers(TrackerOptions(logging_dir=Path({str(tmp_path)!r})), "x", {{}})
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        for step in range(2000): sent.log({{"loss": 1.0}}, step)
        sent.close()
        print("done")
    """
    program = "\n".join(line.strip() for line in program.splitlines())
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert (
        done.stdout == "done\n"
        and len(lines_mentioning(done.stderr, "tensorboard", "File too large")) == 1
    ), done.stderr


# ------------------------------------------------------------------------------------------------------------------ wandb


def test_wandb_gets_project_name_config_and_steps_that_never_go_back(wandb, tmp_path):
    options = TrackerOptions(
        log_with="wandb",
        logging_dir=tmp_path / "logs",
        log_tracker_name="cats",
        wandb_run_name="third",
        wandb_api_key=KEY,
    )
    sent = open_trackers(options, "network_train", {"seed": 7})
    expected = {
        "project": "cats",
        "name": "third",
        "dir": str(tmp_path / "logs"),
        "config": {"seed": 7},
    }
    assert (
        expected.items() <= wandb.arguments.items()
        and wandb.arguments["settings"]["api_key"] == KEY
    )
    assert (tmp_path / "logs").is_dir() and not list((tmp_path / "logs").iterdir())
    sent.log({"loss/current": 0.5}, 10)
    sent.log({"loss/epoch_average": 0.375}, 10, epoch=1)
    sent.log({"loss/late": 0.25}, 9)
    sent.images(IMAGES, 10)
    sent.close()
    assert wandb.run.rows == [
        (10, {"loss/current": 0.5}),
        (10, {"loss/epoch_average": 0.375}),
        (10, {"loss/late": 0.25}),
        (10, {"sample": [("a cat", (8, 8, 3)), ("a dog", (8, 8, 3))]}),
    ]
    assert wandb.run.exit_code == 0


def test_images_of_two_sizes_get_different_keys_in_wandb(wandb):
    sent = open_trackers(TrackerOptions(log_with="wandb"), "network_train", {})
    sent.images([IMAGES[0], ("tall", np.zeros((16, 8, 3), np.uint8))], 3)
    assert wandb.run.rows == [
        (3, {"sample/0": ("a cat", (8, 8, 3)), "sample/1": ("tall", (16, 8, 3))})
    ]


def test_without_options_wandb_gets_the_scripts_name_no_key_and_its_default_folder(wandb):
    open_trackers(TrackerOptions(log_with="wandb"), "network_train", {})
    assert wandb.arguments["project"] == "network_train"
    assert wandb.arguments["name"] is None and wandb.arguments["dir"] is None
    assert "api_key" not in wandb.arguments["settings"]


def test_a_failed_run_is_marked_as_failed_in_wandb(wandb):
    sent = open_trackers(TrackerOptions(log_with="wandb"), "network_train", {})
    with pytest.raises(RuntimeError, match="out of memory"):
        try:
            raise RuntimeError("out of memory")
        finally:
            sent.close()
    assert wandb.run.exit_code == 1


def test_a_wandb_that_cannot_start_is_logged_without_its_key_and_tensorboard_continues(
    wandb, tmp_path, records
):
    wandb.error = ConnectionError(f"no such host, key {KEY}\nmore")
    options = TrackerOptions(log_with="all", logging_dir=tmp_path, wandb_api_key=KEY)
    sent = open_trackers(options, "network_train", {})
    sent.log({"loss": 1.0}, 1)
    sent.close()
    assert events_of(next(tmp_path.glob("*/network_train"))).Scalars("loss")[0].value == 1.0
    (text,) = warnings_of(records)
    assert mentions(text, "wandb", "ConnectionError: no such host, key ***") and "more" not in text


def test_a_key_of_the_environment_is_in_no_message(wandb, monkeypatch, records):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    wandb.run.fails_at = "log"
    wandb.run.url = f"https://wandb.example/run?apiKey={KEY}"
    sent = open_trackers(TrackerOptions(log_with="wandb"), "network_train", {})
    sent.log({"loss": 1.0}, 1)
    assert (
        "the server refuses ***" in records.text
        and "and more" not in records.text
        and KEY not in records.text
    )


def test_values_that_wandb_could_not_send_in_time_can_be_sent_later(wandb, records):
    wandb.run.fails_at = "finish"
    open_trackers(TrackerOptions(log_with="wandb"), "network_train", {}).close()
    assert f"wandb sync {Path('logs/wandb/run-1')}" in warnings_of(records)[0]


def test_the_real_wandb_keeps_a_run_offline_and_leaves_signals_and_command_line_alone(tmp_path):
    """In a process of its own, as wandb's state is global."""
    pytest.importorskip("wandb")
    program = f"""
        import signal
        import numpy as np
        from pathlib import Path
        from library.training.monitoring.trackers import TrackerOptions, open_trackers
        before = [signal.getsignal(which) for which in signal.valid_signals()]
        options = TrackerOptions(log_with="wandb", logging_dir=Path({str(tmp_path)!r}), wandb_api_key={KEY!r})
        sent = open_trackers(options, "network_train", {{"seed": 7}})
        assert [signal.getsignal(which) for which in signal.valid_signals()] == before
        sent.log({{"loss": 0.5}}, 2)
        sent.log({{"loss": 0.25}}, 1)
        sent.images([("dark", np.ones((8, 8, 3), np.uint8)), ("tall", np.ones((16, 8, 3), np.uint8))], 2)
        sent.close()
        print("done")
    """
    program = "\n".join(line.strip() for line in program.splitlines())
    env = {**os.environ, "WANDB_MODE": "offline", "WANDB_ERROR_REPORTING": "false"}
    words = [sys.executable, "-c", program, "--huggingface_token", "hf_secret"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, timeout=120, env=env)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")
    (run,) = tmp_path.glob("wandb/offline-run-*")
    assert len(list(run.glob("files/media/images/**/*.png"))) == 2
    kept = b"".join(path.read_bytes() for path in run.rglob("*") if path.is_file())
    assert b"network_train" in kept and b"loss" in kept
    assert KEY.encode() not in kept and b"hf_secret" not in kept


# ------------------------------------------------------------------------------------------------------ tracker config


def test_the_tables_of_the_tracker_config_are_arguments_and_override_the_run_name(wandb, tmp_path):
    config = tmp_path / "trackers.toml"
    config.write_text(
        '[wandb]\nname = "from file"\ntags = ["a", "b"]\nsettings.init_timeout = 5\nconfig.note = "n"\n'
        '[tensorboard]\nfilename_suffix = ".own"\n'
    )
    options = TrackerOptions(
        log_with="all",
        logging_dir=tmp_path / "logs",
        wandb_run_name="unused",
        log_tracker_config=config,
    )
    open_trackers(options, "network_train", {"seed": 7}).close()
    assert wandb.arguments["name"] == "from file" and wandb.arguments["tags"] == ["a", "b"]
    assert wandb.arguments["config"] == {"seed": 7, "note": "n"}
    assert (
        wandb.arguments["settings"]["init_timeout"] == 5
        and wandb.arguments["settings"]["console"] == "off"
    )
    assert len(list((tmp_path / "logs").glob("*/network_train/*.own"))) == 1


@pytest.mark.parametrize(
    "text, tokens",
    [
        ("[wandb\n", ["TOML"]),
        ("[wanbd]\nname = 'x'\n", ["wanbd", "[tensorboard]", "[wandb]"]),
        ("wandb = 'x'\n", ["wandb", "table", "[wandb]"]),
        ("[wandb]\nnaem = 'x'\n", ["[wandb]", "naem"]),
        ("[wandb]\nsettings = 'x'\n", ["settings", "table", "[wandb.settings]"]),
        ("[tensorboard]\nmax_queu = 3\n", ["[tensorboard]", "max_queu"]),
    ],
)
def test_an_error_in_the_tracker_config_names_the_file(text, tokens, wandb, tmp_path):
    config = tmp_path / "trackers.toml"
    config.write_text(text)
    options = TrackerOptions(
        log_with="all", logging_dir=tmp_path / "logs", log_tracker_config=config
    )
    with pytest.raises(OptionError, match=mentioning("--log_tracker_config", config, *tokens)):
        open_trackers(options, "network_train", {})


def test_a_tracker_config_that_is_not_utf8_is_an_error(tmp_path):
    config = tmp_path / "trackers.toml"
    config.write_bytes("[wandb]\nname = 'Zoë'\n".encode("latin-1"))
    with pytest.raises(OptionError, match=mentioning("--log_tracker_config", config, "UTF-8")):
        read_tracker_config(config)


# ---------------------------------------------------------------------------------------------------------- logged config


def test_the_logged_config_has_the_options_but_no_keys_and_no_paths(tmp_path):
    (tmp_path / "data").mkdir()
    argv = [
        "--pretrained_model_name_or_path", "models/base.safetensors", "--train_data_dir", tmp_path / "data", "--output_dir", tmp_path,
        "--logging_dir", tmp_path, "--wandb_api_key", KEY, "--resolution", "768,1024", "--seed", "7", "--min_snr_gamma", "5",
        "--network_args", "conv_dim=1", "dropout=0.1", "--network_module", "networks.lora",
    ]  # fmt: skip
    config = logged_config(
        read_options("t", [*COMMON_TRAINING, NetworkOptions], [str(word) for word in argv]).specs()
    )
    assert {
        "seed": 7,
        "min_snr_gamma": 5.0,
        "resolution": "768,1024",
        "enable_bucket": False,
    }.items() <= config.items()
    assert config["network_args"] == "conv_dim=1, dropout=0.1"
    assert None not in config.values() and {type(value) for value in config.values()} <= {
        str,
        int,
        float,
        bool,
    }
    text = json.dumps(config)
    assert KEY not in text and str(tmp_path) not in text and "base.safetensors" not in text


def test_no_option_that_is_a_path_is_ever_logged():
    """A new option of this kind is declared with private=True."""
    from library.option_types import specs_of

    groups = [ConfigOptions, *COMMON_TRAINING, NetworkOptions]
    paths = [spec for group in groups for spec in specs_of(group) if Path in spec.kinds]
    assert paths
    assert [spec.name for spec in paths if not spec.is_private] == []
