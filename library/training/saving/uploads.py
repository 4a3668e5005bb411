"""Uploads: saved files are sent to the Hugging Face hub in the background.

What goes wrong there is told in a line and never ends the run, nor keeps it from ending.
"""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from queue import Queue
from threading import Thread

from library.hub import hub_reason, hub_status
from library.log import is_main_process, log
from library.training.options.output import UploadOptions

PAUSES = (5.0, 30.0)  # seconds before the second and the third try
SECONDS_WITHOUT_ANSWER = 120.0  # after which a request has failed; the hub's client would wait for ever
SECONDS_TO_FINISH = 600.0  # for what still waits when the run ends,
SLOWEST_CONNECTION = 1e6  # and a second more for so many bytes


def open_uploads(options: UploadOptions) -> "Uploads | None":
    """Start sending to --huggingface_repo_id, which is made if it isn't there. None without it, or on another process."""
    if options.huggingface_repo_id is None or not is_main_process():
        return None
    return Uploads(options, options.huggingface_repo_id)


class Uploads:
    """Sends files and folders to one repository of the hub, in order, from a thread of its own."""

    def __init__(self, options: UploadOptions, repo_id: str):
        from huggingface_hub import HfApi
        from huggingface_hub.utils import disable_progress_bars, logging

        # The client's bars and its notes on every try would run through the training's own bar.
        disable_progress_bars()
        logging.set_verbosity_error()
        self._repo_id = repo_id
        self._repo_type = options.huggingface_repo_type or "model"
        self._is_private = options.huggingface_repo_visibility != "public"
        self._folder = (options.huggingface_path_in_repo or "").replace("\\", "/").strip("/")
        self._token = (options.huggingface_token or "").strip() or None  # None: the client's own
        self._hub = HfApi(token=self._token)
        self._is_made = False
        self._waiting: list[Path] = []
        self._queue: Queue[Path | None] = Queue()
        # A daemon: where the hub is silent beyond all limits, Python ends all the same.
        self._thread = Thread(target=self._work, name="uploads", daemon=True)
        self._thread.start()

    def send(self, path: Path) -> None:
        """Have a saved file or folder sent; returns at once. What is sent is what lies there when its turn comes."""
        self._waiting.append(path)
        self._queue.put(path)

    def close(self) -> None:
        """Wait for what is under way, within limits. For the end of every run, also one that failed."""
        self._queue.put(None)
        if not self._waiting:
            return
        limit = SECONDS_TO_FINISH + sum(map(_size, self._waiting)) / SLOWEST_CONNECTION
        names = ", ".join(path.name for path in self._waiting)
        log.info("waiting for the upload of %s to %s, at most %.0f minutes", names, self._repo_id, limit / 60)
        self._thread.join(limit)
        for path in list(self._waiting):
            log.warning("%s: not uploaded to %s: there was no time left; hf upload sends it", path, self._repo_id)

    # ------------------------------------------------------------------------------------------------------ the thread

    def _work(self) -> None:
        reason = self._attempt(self._make_repository)
        if reason is not None:
            log.warning("%s: the hub repository can't be made or used: %s", self._repo_id, reason)
        while (path := self._queue.get()) is not None:
            self._tell(path, self._attempt(partial(self._upload, path)))
            self._waiting.remove(path)

    def _tell(self, path: Path, reason: str | None) -> None:
        if reason is None:
            log.info("uploaded %s to %s", path.name, self._repo_id)
        elif not path.exists():
            log.warning("%s: not uploaded to %s: it was removed before its turn", path, self._repo_id)
        else:
            log.warning("%s: not uploaded to %s: %s", path, self._repo_id, reason)

    def _attempt(self, action: Callable[[], None]) -> str | None:
        """Do it, again after a pause where that may help. Returns why it failed, or None."""
        from huggingface_hub import get_session

        for pause in (0.0, *PAUSES):
            time.sleep(pause)
            try:
                get_session().timeout = SECONDS_WITHOUT_ANSWER  # it's a new session after a failure
                action()
            except Exception as error:  # httpx's, the hub's own, hf_xet's: none may end the run
                reason = hub_reason(error, secret=self._token)
                if not _may_pass(error):
                    break
            else:
                return None
        return reason

    def _make_repository(self) -> None:
        """Once made (or found), its full id counts: NAME alone is the user's own NAME."""
        if self._is_made:
            return
        made = self._hub.create_repo(
            self._repo_id,
            repo_type=self._repo_type,
            private=self._is_private,
            exist_ok=True,
            space_sdk="static" if self._repo_type == "space" else None,
        )
        self._repo_id, self._is_made = made.repo_id, True

    def _upload(self, path: Path) -> None:
        self._make_repository()
        where = {"repo_id": self._repo_id, "repo_type": self._repo_type}
        name = f"{self._folder}/{path.name}".lstrip("/")
        if path.is_dir():
            self._hub.upload_folder(folder_path=path, path_in_repo=name, **where)
        else:
            self._hub.upload_file(path_or_fileobj=path, path_in_repo=name, **where)


def _may_pass(error: Exception) -> bool:
    """Whether a failure may be over soon: the network's or the hub's, not the user's."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    status = hub_status(error)
    if status is None:
        return not isinstance(error, (ValueError, OfflineModeIsEnabled))
    return status in (408, 409, 412, 429) or status >= 500


def _size(path: Path) -> int:
    """Bytes of a file or folder; 0 for what is gone."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())
