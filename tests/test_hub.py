"""The hub, as trust.md's faults 14 and 24 have it: uploads that never harm a run, downloads that are whole or one line."""

import logging
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hub_server import FakeHub, environment, use_hub
from messages import lines_mentioning, mentions
from running import ROOT, arguments, script

from library.errors import OptionError
from library.log import log
from library.models.checkpoint import reader as checkpoint
from library.models.checkpoint.reader import locate_vae, open_checkpoint
from library.models.checkpoint.writer import save_diffusers
from library.training.options.output import UploadOptions
from library.training.saving import uploads as uploading
from library.training.saving.uploads import Uploads, open_uploads

TOKEN = "hf_this_must_never_be_told_to_anybody"
UNET = "unet/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub on loopback that this process' client asks, with an empty cache; tries follow each other at once."""
    monkeypatch.setattr(uploading, "PAUSES", (0.0, 0.0))
    with FakeHub() as server:
        use_hub(monkeypatch, server.endpoint, tmp_path / "home")
        yield server


@pytest.fixture
def logged(monkeypatch):
    """The lines of the log."""
    lines: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record):
            lines.append(record.getMessage())

    level = log.level
    monkeypatch.setattr(log, "handlers", [Listener()])
    log.setLevel(logging.INFO)
    yield lines
    log.setLevel(level)


@pytest.fixture
def saved(tmp_path) -> Path:
    path = tmp_path / "output" / "lora.safetensors"
    path.parent.mkdir()
    path.write_bytes(bytes(range(256)) * 4)
    return path


def uploads_to(repo_id: str = "me/loras", **options: object) -> Uploads:
    uploads = open_uploads(
        replace(UploadOptions(), huggingface_repo_id=repo_id, huggingface_token=TOKEN, **options)
    )
    assert uploads is not None
    return uploads


def send(*paths: Path, **options: object) -> None:
    uploads = uploads_to(**options)
    for path in paths:
        uploads.send(path)
    uploads.close()


# ------------------------------------------------------------------------------------------------------------- uploads


def test_files_and_folders_arrive_under_their_names_in_a_private_repository(hub, saved, logged):
    state = saved.parent / "lora-state"
    (state / "inner").mkdir(parents=True)
    (state / "inner" / "step.json").write_text("{}")
    send(saved, state, huggingface_path_in_repo="runs/1/")
    assert hub.repos["me/loras"] == {
        "runs/1/lora.safetensors": saved.read_bytes(),
        "runs/1/lora-state/inner/step.json": b"{}",
    }
    assert [(made["organization"], made["name"], made["visibility"]) for made in hub.made] == [
        ("me", "loras", "private")
    ]
    assert hub.tokens == {f"Bearer {TOKEN}"}
    assert mentions(logged[-2], "lora.safetensors", "me/loras") and mentions(
        logged[-1], "lora-state", "me/loras"
    )


def test_the_repository_may_be_public_a_dataset_or_a_name_alone(hub, saved):
    send(
        saved,
        repo_id="loras",
        huggingface_repo_visibility="public",
        huggingface_repo_type="dataset",
    )
    assert (hub.made[0]["visibility"], hub.made[0]["type"]) == ("public", "dataset")
    assert list(hub.repos["me/loras"]) == ["lora.safetensors"]
    assert "POST /api/datasets/me/loras/commit/main" in hub.requests


def test_without_a_repository_nothing_is_started():
    assert open_uploads(UploadOptions()) is None


def test_sending_returns_at_once_and_closing_waits_and_logs_it(hub, saved, logged):
    """The hub answers nothing until send has returned, and then not before close has said that it waits."""
    hub.answers.clear()
    uploads = uploads_to()
    uploads.send(saved)
    assert not hub.repos.get("me/loras")
    answering = threading.Thread(target=lambda: answer_after_a_log_line(hub, logged))
    answering.start()
    uploads.close()
    answering.join()
    assert list(hub.repos["me/loras"]) == ["lora.safetensors"]
    waiting, done = logged
    assert mentions(waiting, "lora.safetensors", "me/loras", "10 minutes") and mentions(
        done, "lora.safetensors", "me/loras"
    )


def answer_after_a_log_line(hub, logged):
    """Let the hub answer once a line has been logged. The limit only ends a test that fails."""
    for _ in range(600):
        if logged:
            break
        time.sleep(0.05)
    hub.answers.set()


def test_a_hub_that_fails_twice_gets_the_file_at_the_third_try(hub, saved, logged):
    hub.failing = [("/commit/", 500), ("/commit/", 502)]
    send(saved)
    assert hub.repos["me/loras"] == {"lora.safetensors": saved.read_bytes()}
    assert not mentions(logged, saved)  # which the line of a failure names


@pytest.mark.parametrize(
    "status, reason",
    [(401, "hf auth login"), (403, "permission|token"), (404, "repository"), (500, "later|again")],
)
def test_fault_14_a_refusal_is_logged_in_one_line_without_the_token(
    status, reason, hub, saved, logged
):
    hub.status = status
    send(saved)
    created, sent = [line for line in logged if not line.startswith("waiting for")]
    assert mentions(created, "me/loras", reason) and mentions(sent, saved, "me/loras", reason)
    assert TOKEN not in "".join(logged) and "\n" not in created + sent
    asked = sum(line == "POST /api/repos/create" for line in hub.requests)
    assert asked == (6 if status == 500 else 2), "only what may pass is tried again"


def test_fault_14_a_dead_or_silent_hub_is_logged_and_never_raises(hub, saved, logged, monkeypatch):
    monkeypatch.setattr(uploading, "SECONDS_WITHOUT_ANSWER", 0.1)
    hub.silent = True
    send(saved)
    use_hub(monkeypatch, "http://127.0.0.1:9", saved.parent)
    send(saved)
    silent, dead = lines_mentioning(logged, saved)
    assert mentions(silent, hub.endpoint, "me/loras") and mentions(
        dead, "http://127.0.0.1:9", "me/loras"
    )
    assert TOKEN not in "".join(logged)


def test_fault_14_a_run_ends_even_if_the_hub_never_answers(hub, saved, logged, monkeypatch):
    monkeypatch.setattr(uploading, "SECONDS_TO_FINISH", 0.1)
    hub.silent = True
    uploads = uploads_to()
    uploads.send(saved)
    uploads.close()
    assert logged[-1].startswith(f"{saved}: not uploaded to me/loras: no time was left")
    hub.closing.set()
    for thread in threading.enumerate():
        if thread.name == "uploads":
            thread.join(10)  # otherwise it would write to the next test's log


def test_fault_14_python_ends_even_if_an_upload_hangs(hub, saved):
    hub.silent = True
    program = (
        "import pathlib\nfrom library.training.saving.uploads import open_uploads\nfrom library.training.options.output import UploadOptions\n"
        f"uploads = open_uploads(UploadOptions(huggingface_repo_id='me/loras'))\nuploads.send(pathlib.Path({str(saved)!r}))\n"
        "raise SystemExit(3)"
    )
    assert (
        script("-c", program, env=environment(hub.endpoint, saved.parent), timeout=30).returncode
        == 3
    )


def test_a_file_that_was_removed_before_its_turn_is_logged_and_the_next_one_arrives(
    hub, saved, logged
):
    gone = saved.with_name("lora-000001.safetensors")
    send(gone, saved)
    assert mentions(logged, gone, "me/loras", "removed|deleted|gone") and not mentions(
        logged, saved
    )
    assert list(hub.repos["me/loras"]) == ["lora.safetensors"]


def test_offline_uploads_are_not_tried(hub, saved, logged, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    send(saved)
    assert mentions(logged, saved, "me/loras", "HF_HUB_OFFLINE") and not hub.requests


# ----------------------------------------------------------------------------------------------------------- downloads


@pytest.fixture(scope="module")
def folder(golden_models, tmp_path_factory) -> Path:
    """The golden model as a Diffusers folder, among files that nobody needs."""
    path = tmp_path_factory.mktemp("diffusers")
    save_diffusers(path, golden_models.checkpoint, {}, golden_models.tokenizers)
    (path / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"another variant")
    (path / "README.md").write_text("# a model\n")
    return path


@pytest.fixture
def model_hub(hub, folder):
    hub.add_folder("owner/model", folder)
    hub.repos["owner/vae"] = {Path(VAE).name: (folder / VAE).read_bytes()}
    return hub


def assert_same_unet(found: checkpoint.Checkpoint, golden_models) -> None:
    tensors = found.tensors("unet")
    assert all(
        torch.equal(tensors[n], t) for n, t in golden_models.checkpoint.tensors("unet").items()
    )


def test_a_hub_id_downloads_one_variant_which_then_works_offline(
    model_hub, golden_models, monkeypatch
):
    assert_same_unet(open_checkpoint("owner/model"), golden_models)
    assert not model_hub.downloads("fp16.safetensors") and not model_hub.downloads("README.md")
    vae = locate_vae("owner/vae")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model_hub.requests.clear()
    assert_same_unet(open_checkpoint("owner/model"), golden_models)
    assert_same_unet(open_checkpoint("owner/model", prefer_fp16=True), golden_models)
    assert locate_vae("owner/vae") == vae and locate_vae("owner/model").is_dir()
    assert not model_hub.requests


def test_a_hub_id_downloads_the_fp16_variant_if_asked_for(hub, folder):
    hub.add_folder("owner/model", folder)
    both = hub.repos["owner/model"]
    both |= {
        name.replace(".safetensors", ".fp16.safetensors"): b
        for name, b in both.items()
        if ".fp16." not in name
    }
    assert open_checkpoint("owner/model", prefer_fp16=True).is_folder
    assert hub.downloads(".fp16.safetensors") == 4 == hub.downloads(".safetensors")


def test_fault_24_an_interrupted_download_is_continued(model_hub, golden_models):
    model_hub.cuts = [(UNET, 1_000_000), (Path(VAE).name, 1000)]
    assert_same_unet(open_checkpoint("owner/model"), golden_models)
    locate_vae("owner/vae")
    assert model_hub.downloads(UNET) == 2


def test_fault_24_a_broken_connection_is_one_line_and_leaves_no_partial_file(
    model_hub, golden_models
):
    model_hub.cuts = [(UNET, 1_000_000)]
    model_hub.status_after_cut = 404
    with pytest.raises(OptionError) as error:
        open_checkpoint("owner/model")
    assert_one_line(error, "owner/model", "404")
    model_hub.status = None
    assert_same_unet(open_checkpoint("owner/model"), golden_models)


@pytest.mark.parametrize(
    "status, tokens",
    [
        (401, ["hf auth login"]),
        (403, ["permission|token"]),
        (404, ["repository", "name"]),
        (503, ["later|again"]),
    ],
)
@pytest.mark.parametrize("locate", [open_checkpoint, locate_vae])
def test_fault_24_a_refusal_names_the_repository_and_the_remedy(locate, status, tokens, hub):
    hub.status = status
    with pytest.raises(OptionError) as error:
        locate("owner/model")
    assert_one_line(error, "owner/model", status, *tokens)


def test_fault_24_a_silent_or_unreachable_hub_is_an_error_at_once(hub, tmp_path, monkeypatch):
    monkeypatch.setattr("library.hub.SECONDS_TO_ANSWER", 0.2)
    hub.silent = True
    with pytest.raises(OptionError) as error:
        open_checkpoint("owner/model")
    assert_one_line(error, "owner/model", hub.endpoint, "network", "HF_HUB_OFFLINE=1")
    use_hub(monkeypatch, "http://127.0.0.1:9", tmp_path)
    with pytest.raises(OptionError) as error:
        locate_vae("owner/model")
    assert_one_line(error, "--vae", "owner/model", "http://127.0.0.1:9", "network")


def test_an_invalid_repository_id_is_an_error_in_one_line(hub):
    with pytest.raises(OptionError) as error:
        open_checkpoint("owner/two--dashes")
    assert_one_line(error, "owner/two--dashes", "repo_id")


def assert_one_line(error: pytest.ExceptionInfo, *tokens: object) -> None:
    text = str(error.value)
    assert "\n" not in text and mentions(text, *tokens), text


def test_fault_24_offline_without_a_copy_is_an_error_and_sends_no_request(hub, images, tmp_path):
    offline = environment(hub.endpoint, tmp_path / "home") | {"HF_HUB_OFFLINE": "1"}
    words = arguments(Path("owner/model"), images, tmp_path / "output")
    done = script(ROOT / "sdxl_train_network.py", *words, env=offline)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    logged = (
        "error: owner/model: no such local file or folder, and the hub says: HF_HUB_OFFLINE is set"
    )
    assert any(line.startswith(logged) for line in done.stderr.splitlines()), done.stderr
    assert not hub.requests
