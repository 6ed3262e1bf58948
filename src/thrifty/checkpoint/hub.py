"""Models by their hub ids: of a repository what is needed, in the cache that every tool of Hugging Face shares."""

import json
import re
from collections.abc import Iterable
from pathlib import Path

from thrifty.checkpoint.atomic import explained
from thrifty.checkpoint.folder import TEXT_FILES
from thrifty.errors import ThriftyError

_NAME = r"[A-Za-z0-9][\w.-]*"
_ID = re.compile(rf"(?P<repo>{_NAME}(?:/{_NAME})?)(?:/(?P<file>[^@]+\.gguf))?(?:@(?P<revision>[\w./-]+))?")
#: Ends of the names of files, so that a file's name with a slip in it is no model of the hub.
_FILES = (".gguf", ".safetensors", ".keras", ".h5", ".json", ".pth", ".pt", ".bin")
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
#: Seconds that the hub has to answer.
_PATIENCE = 10


def resolve(path_or_id: str | Path) -> Path:
    """The local path of a model: a path as it is, or of a hub id the folder (or .gguf file) in the hub's cache.

    A hub id is "owner/name", "owner/name/file.gguf" for a file of it, or either with "@revision"; a "name" alone counts
    where it is in the cache. What exists is a path, and so is what is in an existing folder, begins with ".", "/" or
    "~", has more than two parts, ends like a file or is no name that the hub allows: a slip of the pen asks nobody. Of
    a repository come its config, `TEXT_FILES` and safetensors; where the hub cannot be reached, or HF_HUB_OFFLINE is
    set, the copy in the cache serves.
    Raises ThriftyError where there is no such model, it needs a login, or it is neither in reach nor in the cache.
    """
    path = Path(path_or_id).expanduser()
    text = path_or_id if isinstance(path_or_id, str) else path.as_posix()
    match = None if path.exists() else _ID.fullmatch(text)
    if match is None:
        return path
    repo, file = match["repo"], match["file"]
    owner, _, name = repo.partition("/")
    if name.endswith(_FILES) or (name and Path(owner).is_dir()) or (file and not name):
        return path
    if ".." in (file or "").split("/") or not _is_id(repo):
        return path
    revision = match["revision"]
    if name:
        return _fetched(repo, revision, file)
    cached = _cached(repo, revision, None)
    return path if cached is None else cached


def _is_id(repo: str) -> bool:
    """Whether the hub could have a model of that name."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError:
        return False
    return True


def _fetched(repo: str, revision: str | None, file: str | None) -> Path:
    """The folder, or the file, in the cache, brought up to date where the hub can be reached."""
    from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download

    try:
        info = HfApi().model_info(repo, revision=revision, timeout=_PATIENCE)
        there = {sibling.rfilename for sibling in info.siblings or ()}
        if file is not None and file not in there:
            raise ThriftyError(f"[hub] '{repo}' must have the file; '{file}' is not in it; {_choice(repo, there)}")
        with explained(constants.HF_HUB_CACHE):
            if file is not None:
                return Path(hf_hub_download(repo, file, revision=revision))
            wanted = [_WEIGHTS] if _WEIGHTS in there else []
            if not wanted and _INDEX in there:
                index = Path(hf_hub_download(repo, _INDEX, revision=revision))
                wanted = [_INDEX, *_shards(index)]
            if not wanted or "config.json" not in there:
                raise _not_a_model(repo, there)
            wanted += ["config.json", *TEXT_FILES]
            return Path(snapshot_download(repo, revision=revision, allow_patterns=wanted))
    except ThriftyError:
        raise
    except Exception as error:  # what a connection raises depends on the version of the hub's client
        cached = _cached(repo, revision, file)
        if cached is None:
            raise _failure(repo, revision, error) from error
        return cached


def _cached(repo: str, revision: str | None, file: str | None) -> Path | None:
    """The whole model, or the file, in the cache; None where some of it is missing."""
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        if file is not None:
            return Path(hf_hub_download(repo, file, revision=revision, local_files_only=True))
        folder = Path(snapshot_download(repo, revision=revision, local_files_only=True, allow_patterns="config.json"))
    except LocalEntryNotFoundError:
        return None
    whole = (folder / _WEIGHTS).is_file() or not (folder / _INDEX).is_file()
    needed = ["config.json", *([_WEIGHTS] if whole else _shards(folder / _INDEX))]
    return folder if all((folder / name).is_file() for name in needed) else None


def _shards(index: Path) -> list[str]:
    """Names of the files that an index names; a folder's reader says what is wrong with one that names none."""
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return sorted({str(name) for name in names})
    except (ValueError, KeyError, AttributeError, TypeError):
        return []


def _not_a_model(repo: str, there: Iterable[str]) -> ThriftyError:
    return ThriftyError(
        f"[hub] a model must have config.json and model.safetensors (or its shards); '{repo}' lacks them; "
        f"{_choice(repo, there)}"
    )


def _choice(repo: str, there: Iterable[str]) -> str:
    files = sorted(name for name in there if name.endswith(".gguf"))
    more = f" or {len(files) - 1} more" if len(files) > 1 else ""
    return f"it has {repo}/{files[0]}{more}" if files else "choose another model"


def _failure(repo: str, revision: str | None, error: Exception) -> ThriftyError:
    """Why a model of the hub cannot be had, in a sentence."""
    from huggingface_hub import constants, errors

    login = "log in (HF_TOKEN, or 'hf auth login')"
    if isinstance(error, errors.GatedRepoError):
        return ThriftyError(
            f"[hub] '{repo}' is given to those who accept its terms; none were accepted, or nobody is logged in; "
            f"accept them at {constants.ENDPOINT}/{repo} and {login}"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return ThriftyError(
            f"[hub] a model must be a path or be on the hub; '{repo}' is no path here, and the hub has none of that "
            f"name or keeps it private; correct the name or {login}"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return ThriftyError(f"[hub] the revision must exist; '{repo}' has no '{revision}'; leave it out or correct it")
    if isinstance(error, errors.OfflineModeIsEnabled):
        return ThriftyError(
            f"[hub] with HF_HUB_OFFLINE set a model must be a path or whole in the cache; '{repo}' is not in "
            f"{constants.HF_HUB_CACHE}; correct the path or unset it"
        )
    what = " ".join(str(error).split()) or type(error).__name__
    return ThriftyError(
        f"[hub] what is not in the cache must come from the hub; '{repo}': {what[:300]}; check the connection, or the "
        "path if one was meant"
    )
