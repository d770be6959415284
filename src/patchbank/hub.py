"""Repositories of the Hugging Face hub: a branch becomes a commit, which never changes; errors that say what to do.

The hub's own package asks, so that its tokens, mirrors and settings (HF_TOKEN, HF_ENDPOINT, ...) are those of others.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
from collections.abc import Iterator
from threading import local
from urllib.parse import unquote

from patchbank.errors import ConfigError, first_line, without_secrets

SCHEME = "hf"
INSTEAD = ", or download the repository (`hf download`) and open that directory."
_URL = re.compile(
    r"hf://((?:datasets/|spaces/)?(?!datasets/|spaces/|buckets/)[^/@]+/[^/@]+)"  # buckets have no commits
    r"(?:@(refs/[^/]+/[^/]+|[^/]+))?((?:/.*)?)",
    re.DOTALL,
)
_here = local()  # .asking: whether this thread is in `asking`


def pinned(url: str) -> str:
    """The URL of a place in a repository with the commit of its branch or tag; the main branch, if it names none.

    One request, and none for a commit, which need not exist. Raises ConfigError if there is no such repository or
    revision, or it cannot be asked for.
    """
    if (match := _URL.fullmatch(url)) is None:
        raise ConfigError(
            f"{url} names no repository: hf://datasets/ORG/NAME/BANK, or hf://datasets/ORG/NAME@REVISION/BANK."
        )
    repo, revision, path = match.groups()
    if re.fullmatch("[0-9a-f]{40}", revision or ""):
        return url
    kind, _, name = ("models/" * (repo.count("/") == 1) + repo).partition("/")
    with asking():
        from huggingface_hub import HfApi, constants

        asked, limit = revision and unquote(revision), constants.HF_HUB_ETAG_TIMEOUT
        try:
            info = HfApi().repo_info(name, revision=asked, repo_type=kind[:-1], timeout=limit)
        except Exception as error:  # the hub's own, and those of one of two HTTP libraries
            raise ConfigError(f"{url}: {reason(error, repo, INSTEAD)}") from error
    return f"hf://{repo}@{info.sha}{path}"


def inside(url: str) -> str:
    """The path of a place within its repository."""
    return match[3].strip("/") if (match := _URL.fullmatch(url)) else ""


def as_os_error(error: BaseException, url: str) -> OSError:
    """An error of the hub's file system, about a place of a repository, with words that say what to do."""
    from huggingface_hub import errors

    if isinstance(error, FileNotFoundError) and isinstance(error.__cause__, errors.HfHubHTTPError):
        error = error.__cause__  # the repository or revision that has gone
    if isinstance(error, FileNotFoundError | errors.EntryNotFoundError):
        return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), url)
    match = _URL.fullmatch(url)
    return OSError(reason(error, match[1] if match else url, INSTEAD))


class _Silent(logging.Filter):
    """Drops what the hub's package says while a thread of ours asks it."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not getattr(_here, "asking", False)


@contextlib.contextmanager
def asking() -> Iterator[None]:
    """Keep the hub's package silent on the terminal in this thread: its retries, and warnings that the hub sends."""
    import huggingface_hub  # noqa: F401 (it adds the handler)

    for handler in logging.getLogger("huggingface_hub").handlers:
        handler.addFilter(_SILENT)  # once: a filter is not added twice
    before, _here.asking = getattr(_here, "asking", False), True
    try:
        yield
    finally:
        _here.asking = before


_SILENT = _Silent()


def reason(error: BaseException, repo: str, instead: str) -> str:
    """Why the hub did not answer, and what to do, in one line.

    Args:
        repo: ``ORG/NAME`` of a model, ``datasets/ORG/NAME``.
        instead: what else can be done; it ends the sentence.
    """
    from huggingface_hub import constants, errors

    host = without_secrets(constants.ENDPOINT)
    if isinstance(error, errors.GatedRepoError):
        licence = f"accept its licence at {host}/{repo}"
        return f"{repo} is gated: {licence}, and set HF_TOKEN to a token of that account{instead}"
    refused = isinstance(error, errors.HfHubHTTPError) and error.response.status_code in (401, 403)
    if refused or isinstance(error, errors.RepositoryNotFoundError):
        return f"{host} has no {repo}, or it is private: check the name, or set HF_TOKEN to a token that may read it."
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo} has no such revision at {host}: see {host}/{repo}/tree/main."
    if isinstance(error, errors.HFValidationError):
        return f"{repo!r} is no name of a repository: give ORG/NAME."
    if isinstance(error, errors.OfflineModeIsEnabled):
        return f"the hub is offline (HF_HUB_OFFLINE is set): unset it{instead}"
    return f"{repo} could not be fetched from {host} ({first_line(error)}): check the network{instead}"
