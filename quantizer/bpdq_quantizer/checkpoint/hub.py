"""A checkpoint goes to the Hugging Face Hub: what is refused before any work, and the upload, which may be repeated.

Nothing is overwritten unless it is asked for: a repository may hold nothing, or files of this very checkpoint, as an
upload that was cut leaves them. huggingface_hub reads the token (HF_TOKEN, `hf auth login`); it is in no message here.
"""

import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelInfo, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, RepositoryNotFoundError
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils import validate_repo_id
from huggingface_hub.utils.sha import git_hash

from bpdq_quantizer.checkpoint import manifest
from bpdq_quantizer.errors import InputError
from bpdq_quantizer.storage.files import file_digest

OWN = ".gitattributes"  # of the Hub, in every new repository
LEFT_OUT = (".*", "*/.*", "resume/*")  # of a folder: `.cache` of `hf download`, `.git`, what a run went on from
NAMED = 3  # files in a message
LOGIN = "log in with `hf auth login`, or set HF_TOKEN, with a token that may write"


def check(repo: str, private: bool, force: bool, folder: Path | None = None) -> ModelInfo | None:
    """What the Hub says of a repository that a checkpoint may go to, or None where it has yet to be created.

    folder: a checkpoint, whose files may be there already. Raises InputError for a name that is none, a token that is
    missing, bad or may not write there, and unless `force` for files that would be overwritten or stay beside it.
    """
    _check_name(repo)
    api = HfApi()
    with _in_one_sentence(repo):
        _check_rights(repo, api.whoami())
        try:
            info = api.model_info(repo, files_metadata=True)
        except RepositoryNotFoundError:
            return None
    if private and not info.private:
        raise InputError(f"{repo} is public: make it private in its settings, or leave --private out")
    others = [file.rfilename for file in info.siblings or () if file.rfilename != OWN and not _same(file, folder)]
    if others and not force:
        more = f" and {len(others) - NAMED} more" if len(others) > NAMED else ""
        raise InputError(
            f"{repo} holds {', '.join(others[:NAMED])}{more}: name another repository, or replace all that it holds "
            "with --force"
        )
    return info


def push(folder: str | Path, repo: str, private: bool = False, force: bool = False) -> dict[str, Any]:
    """Upload a checkpoint folder, but for hidden files and resume/, to a model repository of the Hub, which is created
    if need be.

    Repeated, it goes on: what the Hub has is not sent again. `force` replaces what the repository holds. Raises
    InputError for a folder that is not what `bpdq quantize` wrote, and for whatever keeps it from the Hub; the folder
    stays as it is.
    """
    folder = Path(folder)
    manifest.verify(folder)
    options = [option for option, given in (("--private", private), ("--force", force)) if given]
    again = shlex.join(["bpdq", "push", str(folder), repo, *options])
    try:
        info, api = check(repo, private, force, folder), HfApi()
        with _in_one_sentence(repo):
            if info is None:
                api.create_repo(repo, private=private or None)
                info = api.model_info(repo)
            commit = api.upload_folder(
                repo_id=repo,
                folder_path=folder,
                commit_message="Checkpoint in bit-planes (BPDQ)",
                ignore_patterns=list(LEFT_OUT),
                delete_patterns="*" if force else None,
                parent_commit=info.sha,  # so that what others commit meanwhile is not overwritten
            )
    except BaseException as e:
        e.add_note(f"{folder} is whole, and `{again}` goes on from here")
        raise
    files = [path for path in folder.rglob("*") if path.is_file() and not _left_out(path.relative_to(folder))]
    return {
        "repository": f"{api.endpoint}/{repo}",
        "commit": commit.oid,
        "files": len(files),
        "bytes": sum(path.stat().st_size for path in files),
    }


def _left_out(path: Path) -> bool:
    return path.parts[0] == "resume" or any(part.startswith(".") for part in path.parts)


def _check_name(repo: str) -> None:
    try:
        validate_repo_id(repo)
        if repo.count("/") == 1:
            return
        reason = "it has no owner"
    except HFValidationError as e:
        reason = str(e)
    raise InputError(f"{repo} is no name of a repository ({reason}): expected OWNER/NAME, such as me/model-bpdq")


def _check_rights(repo: str, user: dict[str, Any]) -> None:
    """Raise InputError where `HfApi.whoami` tells that this token may not write there."""
    owner, token = repo.split("/")[0].lower(), user.get("auth", {}).get("accessToken", {})
    if token.get("role") == "read" or not _may_write(token):
        raise InputError(f"{repo}: this Hugging Face token may only read: {LOGIN}")
    roles = {org["name"].lower(): org.get("roleInOrg") for org in user.get("orgs", [])}
    if owner != user["name"].lower() and roles.get(owner, "read") == "read":
        place = "may only read there" if owner in roles else "is no member of it"
        raise InputError(f"{repo}: {user['name']} {place}: name a repository of your own, or log in as another user")


def _may_write(token: dict[str, Any]) -> bool:
    """Whether a token with permissions of its own has that to write somewhere; the Hub knows where."""
    scoped = token.get("fineGrained", {}).get("scoped")
    return scoped is None or any("repo.write" in scope.get("permissions", ()) for scope in scoped)


def _same(file: RepoSibling, folder: Path | None) -> bool:
    """Whether a file of the Hub is one of a folder, by its digest there."""
    if folder is None or not (folder / file.rfilename).is_file():
        return False
    local = folder / file.rfilename
    if file.lfs is not None:
        return file.lfs.sha256 == file_digest(local)
    return file.blob_id == git_hash(local.read_bytes())


@contextmanager
def _in_one_sentence(repo: str) -> Iterator[None]:
    """Raise InputError for what goes wrong between here and the Hub, without the token or signed addresses."""
    try:
        yield
    except InputError:
        raise
    except LocalTokenNotFoundError:
        raise InputError(f"{repo}: there is no Hugging Face token: {LOGIN}") from None
    except HfHubHTTPError as e:
        remedy = {401: LOGIN, 403: LOGIN, 412: "others have changed it meanwhile, look what it holds"}
        raise InputError(
            f"{repo}: the Hub refuses ({_plain(e)}): {remedy.get(e.response.status_code, 'try again later')}"
        ) from None
    except Exception as e:  # of the network, of hf_xet, or of a server that is no Hub
        raise InputError(f"{repo}: the Hub can't be reached or used ({_plain(e)}): mend that, and try again") from None


def _plain(error: BaseException) -> str:
    """What an error says, and what caused it, without the token and what signs an address."""
    text = str(error)
    if isinstance(error.__cause__, HfHubHTTPError):
        text += f" {error.__cause__}"
    text = re.sub(r"\?\S+", "", text) or type(error).__name__
    token = get_token()
    return text.replace(token, "...") if token else text
