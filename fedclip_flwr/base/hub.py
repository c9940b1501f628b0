"""Models and data sets of the Hugging Face hub: from its cache on this machine, else downloaded."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fedclip_flwr.base.errors import UserError, one_line

REVISION = re.compile(r"(?!.*\.\.)[\w.+-]+(/[\w.+-]+)*")
"""Git's rules, without characters that nobody uses: the hub's library turns a revision into a path."""


class IncompleteError(UserError):
    """A downloaded model or data set that lacks files."""


def snapshot(
    name: str, *, kind: str, revision: str, lacks: Callable[[Path], str | None], prefix: str, **patterns: Sequence[str]
) -> Path:
    """The folder in which the hub's cache holds the model or data set (`kind`), downloaded if need be.

    A complete folder in the cache is taken without asking the hub. `lacks` names what a folder lacks, or returns None;
    errors begin with `prefix`.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if revision and not REVISION.fullmatch(revision):
        raise UserError(f"{prefix}: {revision!r} is not a valid revision; expected a commit, a branch or a tag")
    where: dict[str, Any] = {"repo_type": kind, "revision": revision or None, **patterns}
    try:
        folder = Path(snapshot_download(name, local_files_only=True, **where))
        if not lacks(folder):
            return folder
    except HFValidationError:
        raise UserError(f"{prefix}: neither a folder here nor a valid name on the Hugging Face hub") from None
    except LocalEntryNotFoundError:
        pass
    except OSError as error:
        line = f"{error.strerror or error}: {error.filename or constants.HF_HUB_CACHE}"
        raise UserError(f"{prefix}: the Hugging Face cache can't be read ({line})") from None
    command = f"hf download{' --repo-type dataset' * (kind == 'dataset')} {name}"
    command += f" --revision {revision}" * bool(revision)
    copy = f"check the network, or run `{command}` where there is one and copy its cache"
    if constants.HF_HUB_OFFLINE:
        copy = f"run `{command}`, or do so where there is a network and copy its cache"
    try:
        folder = Path(snapshot_download(name, **where))
    except GatedRepoError:
        reason = "access must be requested: do so on its page on the hub, then log in with `hf auth login`"
    except RepositoryNotFoundError:
        reason = f"the hub has no such {kind}, or it is private: check the name, or log in with `hf auth login`"
    except RevisionNotFoundError:
        reason = f"the hub has no revision {revision or 'main'} of it"
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        why = f"the hub can't be reached ({line})"
        if constants.HF_HUB_OFFLINE:
            why = "downloads are disabled (HF_HUB_OFFLINE)"
        reason = f"neither a folder here nor in the Hugging Face cache, and {why}; {copy}"
    else:
        if not (missing := lacks(folder)):
            return folder
        raise IncompleteError(f"{prefix}: {folder} lacks {missing}; if the download is incomplete, {copy}")
    raise UserError(f"{prefix}: {reason}")


def conversion(name: str) -> str | None:
    """The revision with safetensors weights that the hub's own converter offers for the model, or None."""
    from httpx import HTTPError
    from huggingface_hub import HfApi

    try:
        offers = list(HfApi().get_repo_discussions(name, author="SFconvertbot", discussion_type="pull_request"))
    except (HTTPError, OSError):
        return None
    return next((offer.git_reference for offer in offers if offer.status in ("open", "draft")), None)


def check_upload(name: str) -> None:
    """Raises if an upload to that repository would fail, as far as can be known without the hub."""
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        raise UserError(f"--push {name}: expected a valid name on the hub, such as ORG/NAME") from None
    if constants.HF_HUB_OFFLINE:
        raise UserError(f"--push {name}: uploads are disabled by HF_HUB_OFFLINE: unset it")
    if not get_token():
        raise UserError(f"--push {name}: not logged in: run `hf auth login`, or set HF_TOKEN")


def upload(folder: Path, name: str, files: Sequence[str], message: str, *, private: bool | None = None) -> str:
    """Uploads the folder's `files` (patterns) to the model repository, created if missing, and returns its address."""
    from httpx import HTTPError
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    check_upload(name)
    try:
        place = HfApi().create_repo(name, private=private, exist_ok=True)
        if private and not HfApi().model_info(place.repo_id).private:  # it existed before
            raise UserError(
                f"--push {name} --private: the repository exists and is public: choose another name, or make it private"
            )
        HfApi().upload_folder(
            repo_id=place.repo_id,
            folder_path=folder,
            allow_patterns=[*files],
            delete_patterns=[*files],  # of an older upload, which might seem to belong to this one
            commit_message=message,
        )
    except HfHubHTTPError as error:
        reason = f"the hub refused the request ({one_line(error.server_message or error)})"
        if error.response.status_code == 401:
            reason = "the hub rejected the token: log in again with `hf auth login`"
        elif error.response.status_code == 403:
            reason = "the token has no write access there: log in with one that has, or name a repository of your own"
    except (HTTPError, OSError) as error:
        reason = f"the hub can't be reached ({one_line(error)}): check the network, then run the same command again"
    else:
        return str(place)
    raise UserError(f"--push {name}: {reason}")
