"""Uploads of saved files to the Hugging Face hub, in the background.

A failed upload is logged in one line. It never ends the run and never keeps it from ending.
"""

import time
from collections.abc import Callable
from pathlib import Path
from queue import Queue
from threading import Thread
from typing import Any

from library.hub import hub_reason, hub_status
from library.log import is_main_process, log
from library.training.options.output import UploadOptions

PAUSES = (5.0, 30.0)  # seconds before the second and the third attempt
# After this time a request counts as failed; the hub's client would wait without end.
SECONDS_WITHOUT_ANSWER = 120.0
SECONDS_TO_FINISH = 600.0  # for what still waits at the end of the run,
SLOWEST_CONNECTION = 1e6  # and one more for this many bytes


def open_uploads(options: UploadOptions) -> "Uploads | None":
    """Start uploading to --huggingface_repo_id, and create the repository if it does not exist.

    Returns:
        None without this option, and on other processes than the main one.
    """
    if options.huggingface_repo_id is None or not is_main_process():
        return None
    return Uploads(options, options.huggingface_repo_id)


class Uploads:
    """Uploads files and folders to one repository of the hub, in order.

    HfApi's run_as_future does not serve here: Python waits at exit, without a limit, for the
    futures that still run. The thread of this class is a daemon, so Python ends even while the hub
    does not answer.
    """

    def __init__(self, options: UploadOptions, repo_id: str):
        from huggingface_hub import HfApi
        from huggingface_hub.utils import disable_progress_bars, logging

        # The client's progress bars and its notes on each attempt would disturb the progress bar of
        # the training.
        disable_progress_bars()
        logging.set_verbosity_error()
        self._repo_id = repo_id
        self._repo_type = options.huggingface_repo_type or "model"
        self._is_private = options.huggingface_repo_visibility != "public"
        self._folder = (options.huggingface_path_in_repo or "").replace("\\", "/").strip("/")
        token = (options.huggingface_token or "").strip()
        self._token = token or None  # None: the client finds its own
        self._hub = HfApi(token=self._token)
        self._is_made = False
        self._waiting: list[Path] = []
        self._queue: Queue[Path | None] = Queue()
        self._thread = Thread(target=self._work, name="uploads", daemon=True)
        self._thread.start()

    def send(self, path: Path) -> None:
        """Upload a saved file or folder, as it is when its turn comes. Returns at once."""
        self._waiting.append(path)
        self._queue.put(path)

    def close(self) -> None:
        """Wait for the uploads that remain, within a limit.

        Every run calls this at its end, also one that failed.
        """
        self._queue.put(None)
        if not self._waiting:
            return
        limit = SECONDS_TO_FINISH + sum(map(_size, self._waiting)) / SLOWEST_CONNECTION
        names = ", ".join(path.name for path in self._waiting)
        log.info(
            "waiting for the upload of %s to %s, at most %.0f minutes",
            names,
            self._repo_id,
            limit / 60,
        )
        self._thread.join(limit)
        for path in list(self._waiting):
            log.warning(
                "%s: not uploaded to %s: no time was left; `hf upload` can upload it",
                path,
                self._repo_id,
            )

    # The thread

    def _work(self) -> None:
        reason = self._attempt(self._make_repository)
        if reason is not None:
            log.warning(
                "%s: the hub repository can't be created or used: %s", self._repo_id, reason
            )
        while (path := self._queue.get()) is not None:
            reason = self._attempt(self._upload, path)
            if reason is None:
                log.info("uploaded %s to %s", path.name, self._repo_id)
            else:
                if not path.exists():
                    reason = "it was removed before its turn"
                log.warning("%s: not uploaded to %s: %s", path, self._repo_id, reason)
            self._waiting.remove(path)

    def _attempt(self, action: Callable[..., None], *arguments: Any) -> str | None:
        """Call the action, and again after a pause if that may help.

        Returns why it failed, or None.
        """
        from huggingface_hub import get_session

        for pause in (0.0, *PAUSES):
            time.sleep(pause)
            try:
                # After a failure, this is a new session.
                get_session().timeout = SECONDS_WITHOUT_ANSWER
                action(*arguments)
            except Exception as error:  # of httpx, the hub's client or hf_xet: none ends the run
                reason = hub_reason(error, secret=self._token)
                if not _may_pass(error):
                    break
            else:
                return None
        return reason

    def _make_repository(self) -> None:
        """Create or find the repository.

        Its complete id is used from then on: for NAME alone, USER/NAME.
        """
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
        name = f"{self._folder}/{path.name}".lstrip("/")
        where = {"path_in_repo": name, "repo_id": self._repo_id, "repo_type": self._repo_type}
        if path.is_dir():
            self._hub.upload_folder(folder_path=path, **where)
        else:
            self._hub.upload_file(path_or_fileobj=path, **where)


def _may_pass(error: Exception) -> bool:
    """Return whether a failure may be over soon: the network's or the hub's, not the user's."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    status = hub_status(error)
    if status is None:
        return not isinstance(error, (ValueError, OfflineModeIsEnabled))
    return status in (408, 409, 412, 429) or status >= 500


def _size(path: Path) -> int:
    """Return the bytes of a file or folder; 0 if it is gone."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())
