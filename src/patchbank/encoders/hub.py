"""Files of the Hugging Face hub: found in its cache or by a request, downloaded, and checked.

The hub's own package does both, so that its cache, mirrors, tokens and offline mode (HF_HOME, HF_ENDPOINT, HF_TOKEN,
HF_HUB_OFFLINE) are those of every other library. It checks a download's size; the SHA-256 is checked here.
"""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from patchbank.encoders.base import Progress
from patchbank.encoders.quiet import quiet
from patchbank.encoders.weights import sha256_of_weights
from patchbank.errors import WeightsError, install, without_secrets
from patchbank.hub import reason

OR_GIVE = ", or give --weights."  # how messages end that are of weights and not of names
_SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class HubFile:
    """A file of a repository, at one commit.

    Attributes:
        repo: ``ORG/NAME``.
        name: its path in the repository.
        asked: the branch, tag or commit that was asked for; None is the main branch.
        revision: the commit, 40 hexadecimal digits.
        sha256: of its content; None for small files, of which the hub does not say it.
        path: in the hub's cache on this machine; None if it has to be downloaded.
        size: in bytes; 0 if the hub does not say.
        url: where it is downloaded from.
    """

    repo: str
    name: str
    asked: str | None
    revision: str
    sha256: str | None
    path: Path | None
    size: int
    url: str


def locate(repo: str, names: Sequence[str], revision: str | None = None) -> HubFile:
    """The first of `names` that a repository has: in the cache, else by a request; nothing is downloaded.

    Raises WeightsError: the repository, its revision or all names are unknown, or access needs an accepted licence or a
    token; the hub is offline or out of reach and no name is cached; or the cached file is damaged.
    """
    with _hub(repo, *names) as hub:
        for name in names:
            if found := _cached(hub, repo, name, revision):
                return found
        for name in names:
            url = hub.hf_hub_url(repo, name, revision=revision)
            try:
                head = hub.get_hf_file_metadata(url)
            except hub.errors.EntryNotFoundError:
                continue
            if not head.commit_hash:
                raise WeightsError(
                    f"{without_secrets(hub.constants.ENDPOINT)} does not answer as the Hugging Face hub does (it names "
                    f"no commit of {repo}): check HF_ENDPOINT."
                )
            sha256 = head.etag if _SHA256.fullmatch(head.etag or "") else None
            return HubFile(repo, name, revision, head.commit_hash, sha256, None, head.size or 0, without_secrets(url))
    raise WeightsError(f"{repo} has no {' or '.join(names)}: the model's weights are in files of other names.")


def download(file: HubFile, progress: Progress | None = None) -> HubFile:
    """The same file with its path in the cache of this machine; downloads what is not there.

    Calls `progress` after each piece, if huggingface_hub is new enough (1.x). Raises WeightsError as `locate` does, and
    if the content is not what the hub announced; then nothing of it is kept.
    """
    with _hub(file.repo, file.name) as hub:
        if found := _cached(hub, file.repo, file.name, file.revision):
            return replace(file, path=found.path)
        with _progress(hub, progress) as options:
            # A branch by its name, so that the cache says which commit it is: libraries and `locate` look for that.
            for revision in (file.asked, file.revision):
                path = Path(hub.hf_hub_download(file.repo, file.name, revision=revision, **options))
                if _commit(path, file.name) == file.revision:
                    break
        if file.sha256 and (found_sha256 := sha256_of_weights(path)) != file.sha256:
            if path.is_symlink():
                (path.parent / path.readlink()).unlink()
            path.unlink()
            raise WeightsError(
                f"The download of {file.url} is damaged: its SHA-256 is {found_sha256}, not {file.sha256} as the hub "
                "announced. Nothing was kept: try again."
            )
    return replace(file, path=path)


def _cached(hub: Any, repo: str, name: str, revision: str | None) -> HubFile | None:
    """A file in the cache. Raises WeightsError if its content is not that of its name."""
    cached = hub.try_to_load_from_cache(repo, name, revision=revision)
    if not isinstance(cached, str):  # a mark that the repository has no such file, or None
        return None
    path = Path(cached)
    sha256 = _announced(path)
    if sha256 and (found := sha256_of_weights(path)) != sha256:
        raise WeightsError(f"{path.resolve()} is damaged: its SHA-256 is {found}. Delete it, and run again.")
    commit = _commit(path, name)
    url = without_secrets(hub.hf_hub_url(repo, name, revision=commit))
    return HubFile(repo, name, revision, commit, sha256, path, path.stat().st_size, url)


def _announced(path: Path) -> str | None:
    """The SHA-256 in the name of the blob that a path of the cache links to; without links, the content's."""
    if not path.is_symlink():
        return sha256_of_weights(path)
    name = path.readlink().name  # of the first link: a blob may link on, to a file of another kind of name
    return name if _SHA256.fullmatch(name) else None


def _commit(path: Path, name: str) -> str:
    """The commit in a path of the cache: ``.../snapshots/COMMIT/NAME``."""
    return path.parents[name.count("/")].name


@contextlib.contextmanager
def _progress(hub: Any, progress: Progress | None) -> Iterator[dict[str, Any]]:
    """Arguments of ``hf_hub_download`` that call `progress`; of an older one, only its bars are switched off."""
    from tqdm import tqdm

    class Bar(tqdm):  # type: ignore[misc]
        def __init__(self, *_: object, total: int | None = None, initial: int = 0, **__: object) -> None:
            super().__init__(total=total, initial=initial, disable=True)

        def update(self, count: float | None = 1) -> None:
            self.n += count
            if progress:
                progress(int(self.n), int(self.total or 0))

        def update_transfer(self, count: float) -> None:
            """With this method, bytes on the wire get no second bar."""

    if "tqdm_class" in inspect.signature(hub.hf_hub_download).parameters:
        yield {"tqdm_class": Bar}
    elif hub.utils.are_progress_bars_disabled():
        yield {}
    else:
        hub.utils.disable_progress_bars()
        try:
            yield {}
        finally:
            hub.utils.enable_progress_bars()


@contextlib.contextmanager
def _hub(repo: str, *names: str) -> Iterator[Any]:
    """The hub's package without words of its own on the terminal; its errors of some files become WeightsErrors."""
    missing = f"Weights of the Hugging Face hub need its package: {install('timm')}"
    with quiet("huggingface_hub.utils.logging", missing, "huggingface_hub") as hub:
        try:
            yield hub
        except WeightsError:
            raise
        except Exception as error:  # the hub's own, and those of one of three HTTP libraries, and of xet
            raise WeightsError(_reason(repo, names, _cause(error, hub.errors), hub)) from error


def _cause(error: BaseException, errors: Any) -> BaseException:
    """What a download failed of: the hub says only that its cache does not have the file either."""
    while isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__:
        error = error.__cause__
    return error


def _reason(repo: str, names: Sequence[str], error: BaseException, hub: Any) -> str:
    """What went wrong, and what to do, in one line."""
    if isinstance(error, hub.errors.OfflineModeIsEnabled):
        return f"The cache {hub.constants.HF_HUB_CACHE} has no {' or '.join(names)} of {repo}, and " + reason(
            error, repo, OR_GIVE
        )
    return reason(error, repo, OR_GIVE)
