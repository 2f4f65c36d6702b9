"""The Hugging Face hub by huggingface_hub: its token, its endpoint, its resumable downloads.

The first look fixes the commit; everything after is of that commit.
"""

from __future__ import annotations

import os
from pathlib import Path

from lorry.server.errors import PathRefused
from lorry.server.sources.address import MAIN, Source
from lorry.server.sources.remote import PASSING, Stat


class Folder:
    """A folder of a model repository."""

    def __init__(self, source: Source) -> None:
        import huggingface_hub
        from huggingface_hub.utils.tqdm import disable_progress_bars

        disable_progress_bars()
        self._hub = huggingface_hub
        self._api = huggingface_hub.HfApi()
        self._repository = "/".join(source.parts[:2])
        self._folder = "/".join(source.parts[2:])
        self._revision = source.revision or MAIN
        self._commit = ""

    def stat(self, name: str) -> Stat:
        from huggingface_hub.hf_api import RepoFile

        path = f"{self._folder}/{name}" if self._folder else name
        try:
            if not self._commit:
                self._commit = self._api.model_info(self._repository, revision=self._revision).sha or self._revision
            found = self._api.get_paths_info(self._repository, [path], revision=self._commit)
        except Exception as error:
            raise _ours(error, name) from None
        for file in found:
            if isinstance(file, RepoFile) and file.path == path:
                return Stat(file.size, file.blob_id, file.lfs.sha256 if file.lfs else "")
        raise FileNotFoundError(name)

    def fill(self, name: str, stat: Stat, path: Path, most: int) -> None:
        try:
            fetched = self._hub.hf_hub_download(
                self._repository,
                name,
                subfolder=self._folder or None,
                revision=self._commit,
                local_dir=path.parent / "hub",
            )
        except Exception as error:
            raise _ours(error, name) from None
        size = os.path.getsize(fetched)
        if size != stat.size:
            os.unlink(fetched)
            raise ConnectionError(f"{size} bytes came")
        os.replace(fetched, path)


def _ours(error: Exception, name: str) -> Exception:
    """The error of `remote` that a library's means."""
    from huggingface_hub import errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.HFValidationError):
        return PathRefused("the hub has no repository of such a name", field="path")
    if isinstance(error, errors.GatedRepoError):
        message = "the repository is gated: its owner must let in the account whose HF_TOKEN this server has"
        return PathRefused(message, field="path")
    if isinstance(error, errors.OfflineModeIsEnabled):
        return OSError("HF_HUB_OFFLINE is set")
    if isinstance(error, errors.LocalEntryNotFoundError):  # what a download makes of a connection that failed
        return ConnectionError(type(error).__name__)
    if isinstance(error, (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.EntryNotFoundError)):
        return FileNotFoundError(name)
    if status is not None:
        refused = status in (401, 403)
        return PermissionError(name) if refused else _answer(status)
    if isinstance(error, OSError) or type(error).__module__.startswith("httpx"):
        return ConnectionError(type(error).__name__)
    return error


def _answer(status: int) -> OSError:
    return ConnectionError(f"HTTP {status}") if status in PASSING else OSError(f"HTTP {status}")
