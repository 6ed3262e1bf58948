import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from tiny_checkpoints import write_checkpoint

from thrifty.checkpoint.folder import TEXT_FILES
from thrifty.checkpoint.hub import resolve

#: Where nobody answers.
NOWHERE = "http://127.0.0.1:9"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
SHARDS = {"model-1.safetensors": b"one", "model-2.safetensors": b"two"}
INDEX = json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}).encode()
REPOSITORIES: dict[str, dict[str, bytes]] = {
    "owner/whole": {
        "config.json": b"{}",
        "tokenizer.json": b"{}",
        "model.safetensors": b"weights",
        **{name.replace("*", "tool_use"): b"text" for name in TEXT_FILES if name != "tokenizer.json"},
        "pytorch_model.bin": b"the same again",
        "original/model.safetensors": b"the same again",
    },
    "owner/shards": {"config.json": b"{}", "model.safetensors.index.json": INDEX, **SHARDS},
    "owner/ggufs": {"README.md": b"", "a.gguf": b"a", "q/b.gguf": b"b"},
    "owner/old": {"config.json": b"{}", "pytorch_model.bin": b""},
}


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as is asked for: facts of repositories, and their files."""

    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        *_, owner, name = self.path.removeprefix("/api/models/").split("/revision/")[0].split("/tree/")[0].split("/")
        files = REPOSITORIES.get(f"{owner}/{name}")
        if "/resolve/" in self.path:
            repo, _, rest = self.path[1:].partition("/resolve/")
            self.answer(200, REPOSITORIES[repo][rest.partition("/")[2]])
        elif f"{owner}/{name}" == "owner/gated":
            self.answer(401, b"", {"X-Error-Code": "GatedRepo"})
        elif files is None:
            self.answer(401, b"", {"X-Error-Code": "RepoNotFound"})
        elif "/revision/" in self.path and not self.path.endswith((COMMIT, "/main", "/v1")):
            self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        elif "/tree/" in self.path:
            entries = [
                {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for path, data in files.items()
            ]
            self.answer(200, json.dumps(entries).encode())
        else:
            siblings = [{"rfilename": path} for path in files]
            facts: dict[str, Any] = {"_id": "1", "id": f"{owner}/{name}", "sha": COMMIT, "siblings": siblings}
            self.answer(200, json.dumps(facts).encode())

    do_HEAD = do_GET

    def answer(self, status: int, body: bytes, more: dict[str, str] | None = None) -> None:
        self.send_response(status)
        etag = hashlib.sha1(body).hexdigest()
        for key, value in {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, **(more or {})}.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        del format, args


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    Hub.asked = []
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def run(models: str, home: Path, endpoint: str, **settings: str) -> str:
    """The path, or the error, of each of some hub ids, a line each, in a process of its own.

    The hub's client reads its settings when it is imported.
    """
    code = (
        "import sys\nfrom thrifty import ThriftyError\nfrom thrifty.checkpoint.hub import resolve\n"
        "for model in sys.argv[1:]:\n try: print(resolve(model))\n except ThriftyError as e: print(e)"
    )
    given = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "*"}
    keep = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    command = [sys.executable, "-c", code, *models.split()]
    done = subprocess.run(command, env=keep | given | settings, capture_output=True, text=True, cwd=home)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def cached(home: Path, repo: str, files: dict[str, bytes]) -> Path:
    """A repository in the hub's cache, laid out as its client does."""
    place = home / "hub" / f"models--{repo.replace('/', '--')}"
    snapshot = place / "snapshots" / COMMIT
    for name, data in files.items():
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).write_bytes(data)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(COMMIT)
    return snapshot


#: What the hub allows in no name.
NO_NAMES = ["my--model", "a--b/c", "owner/na..me", f"owner/{'a' * 97}", "owner/name.git", "owner/name/../x.gguf"]


@pytest.mark.parametrize(
    "text",
    [
        "runs/demo/pakced",
        "./model",
        "../model",
        "/no/model",
        "runs/model.gguf",
        "pakced",
        "a b/c",
        "",
        "a/b/c/d",
        *NO_NAMES,
    ],
)
def test_what_is_no_hub_id_stays_a_path(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("asked the network"))
    assert resolve(text) == Path(text)
    assert resolve(Path(text)) == Path(text)


def test_what_exists_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("asked the network"))
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert resolve("owner/name") == Path("owner/name")
    # A slip in the name of a folder beside it.
    assert resolve("owner/naem") == Path("owner/naem")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/owner") == tmp_path / "owner"


def test_what_is_needed_of_a_repository_comes(endpoint, tmp_path):
    path = run("owner/whole", tmp_path, endpoint)
    found = {str(file.relative_to(path)) for file in Path(path).rglob("*") if file.is_file()}
    texts = {"tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json"}
    assert found > texts | {"config.json", "model.safetensors", "additional_chat_templates/tool_use.jinja"}
    assert not found & {"pytorch_model.bin", "original/model.safetensors"}
    assert Path(path, "model.safetensors").read_bytes() == b"weights"
    # Without the hub the copy serves.
    assert run("owner/whole", tmp_path, endpoint, HF_HUB_OFFLINE="1") == path
    assert run("owner/whole", tmp_path, NOWHERE) == path


def test_shards_come_by_their_index_and_one_gguf_file_of_several(endpoint, tmp_path):
    shards, file = run("owner/shards@v1 owner/ggufs/q/b.gguf", tmp_path, endpoint).splitlines()
    assert {name: Path(shards, name).read_bytes() for name in SHARDS} == SHARDS
    assert Path(file).read_bytes() == b"b"
    assert not list(tmp_path.rglob("a.gguf"))
    assert run("owner/ggufs/q/b.gguf", tmp_path, endpoint, HF_HUB_OFFLINE="1") == file


def test_a_failure_is_one_sentence(endpoint, tmp_path):
    sentences = {
        "owner/none": "is no path here, and the hub has none of that name or keeps it private.*HF_TOKEN",
        "owner/gated": "accept them at http.*/owner/gated and log in .HF_TOKEN",
        "owner/whole@v9": "'owner/whole' has no 'v9'",
        "owner/ggufs": "'owner/ggufs' lacks them; it has owner/ggufs/a.gguf or 1 more",
        "owner/ggufs/c.gguf": "'c.gguf' is not in it; it has owner/ggufs/a.gguf",
        "owner/old": "'owner/old' lacks them; choose another model",
    }
    errors = run(" ".join(sentences), tmp_path, endpoint).splitlines()
    for error, sentence in zip(errors, sentences.values(), strict=True):
        assert re.search(rf"^\[hub\] .*{sentence}", error), error


def test_without_the_hub_and_a_copy_the_way_out_is_named(tmp_path):
    error = run("owner/name", tmp_path, NOWHERE)
    assert re.fullmatch(r"\[hub\] what is not in the cache must come from the hub; 'owner/name': .+", error)
    error = run("owner/name", tmp_path, NOWHERE, HF_HUB_OFFLINE="1")
    assert f"'owner/name' is not in {tmp_path / 'hub'}; correct the path or unset it" in error


def test_a_copy_that_lacks_a_shard_does_not_serve(tmp_path):
    snapshot = cached(tmp_path, "owner/shards", REPOSITORIES["owner/shards"])
    assert run("owner/shards", tmp_path, NOWHERE, HF_HUB_OFFLINE="1") == str(snapshot)
    (snapshot / "model-2.safetensors").unlink()
    assert "'owner/shards' is not in" in run("owner/shards", tmp_path, NOWHERE, HF_HUB_OFFLINE="1")


def test_a_name_alone_is_looked_for_in_the_cache_only(endpoint, tmp_path):
    Hub.asked.clear()
    snapshot = cached(tmp_path, "single", REPOSITORIES["owner/whole"])
    assert run("single other", tmp_path, endpoint) == f"{snapshot}\nother"
    assert Hub.asked == []


def test_a_model_runs_by_its_id(tmp_path):
    tiny = write_checkpoint(tmp_path / "tiny")
    cached(tmp_path, "owner/tiny", {file.name: file.read_bytes() for file in tiny.path.iterdir()})
    keep = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    command = [sys.executable, "-m", "thrifty", "generate", "--max-new-tokens", "3", "--threads", "1"]
    texts = [
        subprocess.run(
            [*command, model, "a"],
            env=keep | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            check=True,
        ).stdout
        for model in ("owner/tiny", "owner/tiny@main", str(tiny.path))
    ]
    assert len(set(texts)) == 1
    assert texts[0]


def test_the_hubs_client_is_imported_only_when_asked():
    code = "import sys, thrifty.checkpoint.hub as h; h.resolve('.'); print('huggingface_hub' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
