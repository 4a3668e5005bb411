"""The Hugging Face hub's client: what is in a repository, and why the client failed, in words."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from library.errors import OptionError, first_line

SECONDS_TO_ANSWER = 15.0  # for the hub, when it is asked for a repository's files


def hub_files(repo_id: str) -> list[str]:
    """The names of the repository's files; offline (HF_HUB_OFFLINE), of those in its local copy."""
    import huggingface_hub
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        # Asking for the whole repository would refuse our own copies, which leave out the other variants.
        folder = Path(huggingface_hub.snapshot_download(repo_id, allow_patterns=["model_index.json"]))
        return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    # list_repo_files would wait for ever for a hub that is silent, and half a minute for one that isn't there.
    found = huggingface_hub.HfApi().model_info(repo_id, timeout=SECONDS_TO_ANSWER)
    return [file.rfilename for file in found.siblings or []]


def download_folder(name: str, token: str | None) -> Path:
    """This machine's copy of OWNER/REPOSITORY/FOLDER[:REVISION[:TYPE]]. Raises OptionError."""
    import huggingface_hub

    place, revision, kind, *_ = [*name.split(":"), "", ""]
    owner, repository, folder = place.split("/", 2)
    with hub_errors(name):
        found = huggingface_hub.snapshot_download(
            f"{owner}/{repository}",
            revision=revision or None,
            repo_type=kind or None,
            allow_patterns=[f"{folder}/*"],
            token=token,
        )
    return Path(found) / folder


@contextmanager
def hub_errors(name: str) -> Iterator[None]:
    """Turns what the hub's client raises (no network, no such id, no permission) into one line."""
    from huggingface_hub.errors import HTTPError  # httpx's, or httpx2's

    try:
        yield
    except OptionError:
        raise
    except (HTTPError, OSError, ValueError, RuntimeError) as error:  # ValueError: an impossible id
        raise OptionError(
            f"{name}: no such file or folder here, and the hub says: {hub_reason(error, downloading=True)}"
        ) from None


def hub_status(error: BaseException) -> int | None:
    """The HTTP status that the hub's client failed with; None where it got no answer."""
    for cause in _causes(error):
        if (response := getattr(cause, "response", None)) is not None:
            return response.status_code
    return None


def hub_reason(error: BaseException, *, downloading: bool = False, secret: str | None = None) -> str:
    """Why the hub's client failed, in one line: what went wrong and what to do.

    Args:
        downloading: an earlier download would help, so the line speaks of it.
        secret: a token that must not be told; that of HF_TOKEN and what looks like one is left out anyway.
    """
    text = _hub_reason(error, downloading)
    for token in (secret, os.environ.get("HF_TOKEN", "").strip()):
        text = text.replace(token, "***") if token else text
    return re.sub(r"\bhf_\w{20,}", "***", text)


_HUB_STATUS = {
    401: ("no such repository, or not logged in", "check its name, or log in by hf auth login or HF_TOKEN"),
    403: ("no permission", "the token must cover this repository; a gated one wants its terms accepted on its page"),
    404: ("no such repository", "check its name and kind, and that you may see it"),
    429: ("too many requests", "try again later"),
}


def _hub_reason(error: BaseException, downloading: bool) -> str:
    from huggingface_hub import constants

    status = hub_status(error)
    if status is not None:
        what, remedy = _HUB_STATUS.get(status, ("the request failed", "try again later"))
        said = [str(line) for cause in _causes(error) if (line := getattr(cause, "server_message", None))]
        return f"{what} ({status}{': ' + said[0].splitlines()[0][:200] if said else ''}); {remedy}"
    copy = ", or set HF_HUB_OFFLINE=1 to take what was downloaded before" if downloading else ""
    for cause in _causes(error):
        # By name, as the client brings httpx or httpx2, depending on its version.
        kinds = {kind.__name__ for kind in type(cause).__mro__}
        if "OfflineModeIsEnabled" in kinds:
            lack = ", and there is no whole copy in its cache" if downloading else ""
            return f"HF_HUB_OFFLINE is set{lack}; unset it{' for one run' if downloading else ''}"
        if "TimeoutException" in kinds:
            return f"{constants.ENDPOINT} does not answer in time; check the network{copy}"
        if "ConnectError" in kinds:
            return f"{constants.ENDPOINT} can't be reached ({first_line(cause)}); check the network{copy}"
        if "TransportError" in kinds:
            return f"the connection to {constants.ENDPOINT} broke ({first_line(cause)}); try again{copy}"
    return first_line(error)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and what it was raised from: the client wraps what happened in errors of its own."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__
