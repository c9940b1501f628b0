"""Models and data sets of the Hugging Face hub: from its cache on this machine, else downloaded."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fedclip_flwr.base.errors import UserError, one_line

REVISION = re.compile(r"(?!.*\.\.)[\w.+-]+(/[\w.+-]+)*")
"""As git allows them, but for signs that nobody uses; the hub's library makes a path of it."""


class IncompleteError(UserError):
    """What there is lacks something."""


def snapshot(
    name: str, *, kind: str, revision: str, lacks: Callable[[Path], str | None], told: str, **patterns: Sequence[str]
) -> Path:
    """The folder in which the hub's cache holds the model or data set (`kind`), downloaded if need be.

    What is in the cache is taken as it is: nothing is looked up on the hub if nothing is lacking. `lacks` says what a
    folder lacks; `told` is how errors begin.
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
        raise UserError(f"{told}: {revision!r} can't be a revision; expected a commit, a branch or a tag")
    where: dict[str, Any] = {"repo_type": kind, "revision": revision or None, **patterns}
    try:
        folder = Path(snapshot_download(name, local_files_only=True, **where))
        if not lacks(folder):
            return folder
    except HFValidationError:
        raise UserError(f"{told}: neither a folder here nor a name that the Hugging Face hub could have") from None
    except LocalEntryNotFoundError:
        pass
    except OSError as error:
        line = f"{error.strerror or error}: {error.filename or constants.HF_HUB_CACHE}"
        raise UserError(f"{told}: the Hugging Face cache can't be read ({line})") from None
    command = f"hf download{' --repo-type dataset' * (kind == 'dataset')} {name}"
    command += f" --revision {revision}" * bool(revision)
    copy = f"check the network, or run `{command}` where there is one and copy its cache"
    if constants.HF_HUB_OFFLINE:
        copy = f"run `{command}`, or do so where there is a network and copy its cache"
    try:
        folder = Path(snapshot_download(name, **where))
    except GatedRepoError:
        reason = "access to it has to be asked for: do so at its page on the hub, then log in with `hf auth login`"
    except RepositoryNotFoundError:
        reason = f"the hub has no such {kind}, or it is private: check the name, or log in with `hf auth login`"
    except RevisionNotFoundError:
        reason = f"the hub has no revision {revision or 'main'} of it"
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        why = f"the hub can't be reached ({line})"
        if constants.HF_HUB_OFFLINE:
            why = "nothing is downloaded now (HF_HUB_OFFLINE)"
        reason = f"neither a folder here nor in the Hugging Face cache, and {why}; {copy}"
    else:
        if not (missing := lacks(folder)):
            return folder
        raise IncompleteError(f"{told}: {folder} lacks {missing}; if it is only half there, {copy}")
    raise UserError(f"{told}: {reason}")


def conversion(name: str) -> str | None:
    """The revision in which the hub's own converter offers a model's weights as safetensors, if there is one."""
    from httpx import HTTPError
    from huggingface_hub import HfApi

    try:
        offers = list(HfApi().get_repo_discussions(name, author="SFconvertbot", discussion_type="pull_request"))
    except (HTTPError, OSError):
        return None
    return next((offer.git_reference for offer in offers if offer.status in ("open", "draft")), None)


def check_upload(name: str) -> None:
    """Raises where nothing can be uploaded to that repository, as far as that is known here."""
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        raise UserError(f"--push {name}: expected a name that the hub can have, such as ORG/NAME") from None
    if constants.HF_HUB_OFFLINE:
        raise UserError(f"--push {name}: nothing is uploaded while HF_HUB_OFFLINE is set: unset it")
    if not get_token():
        raise UserError(f"--push {name}: nobody is logged in: run `hf auth login`, or set HF_TOKEN")


def upload(folder: Path, name: str, files: Sequence[str], message: str, *, private: bool | None = None) -> str:
    """The address of the hub's model, made if need be, whose `files` (patterns) are then those of the folder."""
    from httpx import HTTPError
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    check_upload(name)
    try:
        place = HfApi().create_repo(name, private=private, exist_ok=True)
        if private and not HfApi().model_info(place.repo_id).private:  # it was there before
            raise UserError(
                f"--push {name} --private: it is there already, and for all to see: name another, or change it"
            )
        HfApi().upload_folder(
            repo_id=place.repo_id,
            folder_path=folder,
            allow_patterns=[*files],
            delete_patterns=[*files],  # of an older one, which might be taken for this one's
            commit_message=message,
        )
    except HfHubHTTPError as error:
        reason = f"the hub refused it ({one_line(error.server_message or error)})"
        if error.response.status_code == 401:
            reason = "the hub does not know the token: log in anew with `hf auth login`"
        elif error.response.status_code == 403:
            reason = "the token may not write there: log in with one that may, or name a repository of your own"
    except (HTTPError, OSError) as error:
        reason = f"the hub can't be reached ({one_line(error)}): check the network, then give the same command again"
    else:
        return str(place)
    raise UserError(f"--push {name}: {reason}")
