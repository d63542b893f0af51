"""Names on the Hugging Face Hub, with the revision that is asked for, and the commit that it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lediflow.errors import UserError


def split_revision(name: str) -> tuple[str, str | None]:
    """Return a Hub id and its revision: ``owner/name@v1`` has one, ``owner/name`` and a folder have none.

    A revision is a branch, a tag or a commit's hash.
    """
    if Path(name).expanduser().exists():
        return name, None
    found, _, revision = name.partition("@")
    return found, revision or None


def is_cached(name: str, file: str, revision: str | None) -> bool:
    """Whether a model's file is in the Hub's cache on this machine."""
    from huggingface_hub import try_to_load_from_cache

    try:
        return isinstance(try_to_load_from_cache(name, file, revision=revision), str)
    except ValueError:  # no Hub id; asking for it will say so
        return False


def why_unreachable(name: str, file: str, revision: str | None) -> str:
    """Return quickly why the Hub cannot be asked for a model's file, "" if it can; loading tries for long."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    try:
        get_hf_file_metadata(hf_hub_url(name, file, revision=revision), timeout=10)
    except Exception as error:  # no network, a proxy's refusal, no such model: each its own kind
        return type(error).__name__
    return ""


def dataset_commit(name: str, revision: str | None) -> str | None:
    """Return the commit that a revision of a data set is now; None where the Hub does not tell."""
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(name, revision=revision, timeout=10).sha
    except Exception:  # no network, no such data set or revision: loading it says which
        return None


def download_model(name: str, **options: Any) -> str:
    """Fetch the configs and weights of a model repository; return its folder in the cache.

    No code and no pickle files are among them.

    Args:
        name: owner/name.
        options: of diffusers' `from_pretrained`; revision, cache_dir, token, local_files_only and
            force_download count, and what is None counts as not given.
    """
    from huggingface_hub import snapshot_download

    known = ("revision", "cache_dir", "token", "local_files_only", "force_download")
    given = {key: options[key] for key in known if options.get(key) is not None}
    return snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model"], **given)


def check_repository(name: str) -> None:
    """Refuse what cannot be a repository of one's own.

    Raises:
        UserError: it is not owner/name, or has characters that the Hub does not take.
    """
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"{name!r} is no name on the Hub: {str(error).splitlines()[0]}") from None
    if name.count("/") != 1:
        raise UserError(f"{name!r} is no name on the Hub: give owner/name")


def upload_model(folder: Path, name: str, *, revision: str | None = None, private: bool = False) -> str:
    """Upload a folder as one commit of a model repository, which is made if it is not there.

    Args:
        folder: what is uploaded.
        name: owner/name.
        revision: branch, made if it is not there; None for the main one.
        private: of a repository that is made now; one that is there stays as it is.

    Returns:
        address of the commit.

    Raises:
        UserError: the Hub cannot be reached or refuses.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(name, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(name, branch=revision, exist_ok=True)
        done = api.upload_folder(
            repo_id=name, folder_path=folder, revision=revision, commit_message="Upload with lediflow push"
        )
    except Exception as error:  # no network, no token, no right to write: each its own kind
        reason = f"{type(error).__name__}: {[*str(error).strip().splitlines(), ''][0]}"
        raise UserError(
            f"the Hub did not take {name} ({reason}); log in with `hf auth login` as somebody who may write "
            "there"
        ) from None
    return str(done.commit_url)
