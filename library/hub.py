"""The Hugging Face hub: the files of a repository, downloads, and readable reasons of failures."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from library.errors import OptionError, first_line

SECONDS_TO_ANSWER = 15.0  # for the hub, when it is asked for a repository's files


def hub_files(repo_id: str) -> list[str]:
    """Return the names of the repository's files; with HF_HUB_OFFLINE, of those in its local copy."""
    import huggingface_hub
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        # A complete copy would be required if we asked for all files, and our copies leave other
        # variants out.
        folder = Path(
            huggingface_hub.snapshot_download(repo_id, allow_patterns=["model_index.json"])
        )
        return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    # list_repo_files has no timeout.
    info = huggingface_hub.HfApi().model_info(repo_id, timeout=SECONDS_TO_ANSWER)
    return [file.rfilename for file in info.siblings or []]


def download_folder(name: str, token: str | None) -> Path:
    """Download OWNER/REPOSITORY/FOLDER[:REVISION[:TYPE]], and return the local copy.

    Raises OptionError.
    """
    import huggingface_hub

    location, revision, kind, *_ = [*name.split(":"), "", ""]
    owner, repository, folder = location.split("/", 2)
    with hub_errors(name):
        copy = huggingface_hub.snapshot_download(
            f"{owner}/{repository}",
            revision=revision or None,
            repo_type=kind or None,
            allow_patterns=[f"{folder}/*"],
            token=token,
        )
    return Path(copy) / folder


@contextmanager
def hub_errors(name: str) -> Iterator[None]:
    """Context manager: turn the errors of the hub's client into an OptionError."""
    from huggingface_hub.errors import HTTPError  # httpx's, or httpx2's

    try:
        yield
    except OptionError:
        raise
    except (HTTPError, OSError, ValueError, RuntimeError) as error:  # ValueError: an impossible id
        raise OptionError(
            f"{name}: no such local file or folder, and the hub says: "
            f"{hub_reason(error, downloading=True)}"
        ) from None


def hub_status(error: BaseException) -> int | None:
    """Return the HTTP status of a failure of the hub's client, or None if it got no answer."""
    for cause in _causes(error):
        if (response := getattr(cause, "response", None)) is not None:
            return response.status_code
    return None


def hub_reason(
    error: BaseException, *, downloading: bool = False, secret: str | None = None
) -> str:
    """Return in one line why the hub's client failed, and what to do.

    Args:
        error: of the client.
        downloading: mention that an earlier download would help.
        secret: a token that must not be shown. The one in HF_TOKEN, and text that looks like a
            token, never are.
    """
    text = _hub_reason(error, downloading)
    for token in (secret, os.environ.get("HF_TOKEN", "").strip()):
        if token:
            text = text.replace(token, "***")
    return re.sub(r"\bhf_\w{20,}", "***", text)


_HUB_STATUS = {
    401: (
        "no such repository, or not logged in",
        "check its name, or log in by hf auth login or HF_TOKEN",
    ),
    403: (
        "no permission",
        "the token must cover this repository; a gated one wants its terms accepted on its page",
    ),
    404: ("no such repository", "check its name and kind, and that you may see it"),
    429: ("too many requests", "try again later"),
}


def _hub_reason(error: BaseException, downloading: bool) -> str:
    from huggingface_hub import constants

    status = hub_status(error)
    if status is not None:
        what, remedy = _HUB_STATUS.get(status, ("the request failed", "try again later"))
        return f"{what} ({status}{_server_message(error)}); {remedy}"
    copy = ", or set HF_HUB_OFFLINE=1 to use an earlier download" if downloading else ""
    for cause in _causes(error):
        # By name, as the client brings httpx or httpx2, depending on its version.
        kinds = {kind.__name__ for kind in type(cause).__mro__}
        if "OfflineModeIsEnabled" in kinds:
            if downloading:
                return "HF_HUB_OFFLINE is set, and the cache has no complete copy; unset it for one run"
            return "HF_HUB_OFFLINE is set; unset it"
        if "TimeoutException" in kinds:
            return f"{constants.ENDPOINT} does not answer in time; check the network{copy}"
        if "ConnectError" in kinds:
            reason = first_line(cause)
            return f"{constants.ENDPOINT} can't be reached ({reason}); check the network{copy}"
        if "TransportError" in kinds:
            reason = first_line(cause)
            return f"the connection to {constants.ENDPOINT} broke ({reason}); try again{copy}"
    return first_line(error)


def _server_message(error: BaseException) -> str:
    for cause in _causes(error):
        message = getattr(cause, "server_message", None)
        if message:
            return ": " + str(message).splitlines()[0][:200]
    return ""


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield the error and its causes, which the client wraps in errors of its own."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__
