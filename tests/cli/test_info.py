import json
import re

import pytest

from thrifty import native
from thrifty.cli import main
from thrifty.runtime.measure import Size, write_random

SIZE = Size(64, 32, 48, 2, 2, 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_random(tmp_path_factory.mktemp("models") / "random", SIZE)


def test_code_paths_and_extras_are_shown(capsys):
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    for word in (native.isa(), *native.built_isas(), *native.detected_isas(), "transformers", "threads"):
        assert word in text


@pytest.mark.parametrize("terminal", [True, False])
def test_no_path_is_cut(capsys, monkeypatch, terminal):
    library = "/a/very/long" + "/path" * 40 + "/libthrifty.so"
    facts = native.info() | {"library": library}
    monkeypatch.setattr(native, "info", lambda: facts)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("FORCE_COLOR" if terminal else "NO_COLOR", "1")
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert "…" not in text
    assert library in (text if not terminal else re.sub(r"\x1b\[[0-9;]*m|\s", "", text))


def test_json_holds_the_parts_of_a_model(folder, capsys):
    assert main(["info", str(folder), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["thrifty"]["built"] == list(native.built_isas())
    model = facts["model"]
    assert model["hidden_size"] == 32
    assert model["bytes"]["embedding"] == 2 * 64 * 32
    codes = 2 * (32 * 32 + 2 * 16 * 32 + 32 * 32 + 3 * 48 * 32) // 4
    scales = 2 * 7 * 2
    assert model["bytes"]["ternary linears"] == codes + scales
    assert model["total bytes"] == sum(model["bytes"].values())


def test_a_model_is_shown(folder, capsys):
    assert main(["info", str(folder)]) == 0
    assert "packed, 2 bits a weight" in capsys.readouterr().out


def test_what_is_no_model_is_named(tmp_path, capsys):
    assert main(["info", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: [checkpoint]")
