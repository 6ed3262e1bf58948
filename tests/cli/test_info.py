import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from tiny_checkpoints import write_checkpoint

from thrifty import native
from thrifty.checkpoint import Tensor, open_safetensors, save_gguf, save_safetensors
from thrifty.checkpoint.gguf import TensorToWrite
from thrifty.cli import main
from thrifty.cli.info import COLUMNS, show_model, zeros_chart
from thrifty.runtime.measure import Size, write_random
from thrifty.spec import gguf_encode

WEIGHTS = "model.safetensors"
SIZE = Size(64, 32, 48, 2, 2, 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_random(tmp_path_factory.mktemp("models") / "random", SIZE)


def facts_of(path: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main(["info", str(path), "--json"]) == 0
    return json.loads(capsys.readouterr().out)["model"]


def error_of(path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["info", str(path)]) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.count("\n") == 1
    return error


def write_gguf(path: Path, codes: dict[str, np.ndarray], kind: str = "TQ2_0", **metadata: Any) -> Path:
    tensors = [TensorToWrite(name, kind, c.shape, lambda c=c: gguf_encode(kind, c, 0.5)) for name, c in codes.items()]
    save_gguf(path, {"general.architecture": "unheard-of", **metadata}, tensors)
    return path


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
    assert model["config"]["hidden_size"] == 32
    assert model["bytes"]["embedding"] == 2 * 64 * 32
    weights = 2 * (32 * 32 + 2 * 16 * 32 + 32 * 32 + 3 * 48 * 32)
    scales = 2 * 7 * 2
    assert model["weights"]["ternary linears"] == weights
    assert model["bytes"]["ternary linears"] == weights // 4 + scales
    assert model["total bytes"] == sum(model["bytes"].values())
    assert model["parameters"] == sum(model["weights"].values())
    assert model["bits per weight"]["ternary linears"] == pytest.approx(2, abs=0.05)
    assert model["bits per weight"]["all"] == 8 * model["total bytes"] / model["parameters"]
    assert (model["runs here"], model["storage"], model["tokenizer"]) == ("yes", "packed", None)
    assert model["scales"] == "multiply the codes (autobitlinear)"


@pytest.mark.parametrize("linear_class", ["autobitlinear", "bitlinear"])
def test_zeros_are_counted_layer_by_layer(tmp_path, capsys, linear_class):
    packed = {"quant_method": "bitnet", "linear_class": linear_class, "quantization_mode": "offline"}
    tiny = write_checkpoint(tmp_path / "model", num_hidden_layers=11, quantization_config=packed)
    # transformers writes tensors by name: layer 10 stands before layer 2.
    tensors = {name: Tensor(t.dtype, t.data.copy()) for name, t in open_safetensors(tiny.path / WEIGHTS).items()}
    save_safetensors(tiny.path / WEIGHTS, dict(sorted(tensors.items())))
    model = facts_of(tiny.path, capsys)
    assert model["scales"].startswith("multiply" if linear_class == "autobitlinear" else "divide")
    for kind in ("self_attn.k_proj", "mlp.down_proj"):
        shares = [float((tiny.codes[f"model.layers.{i}.{kind}"][0] == 0).mean()) for i in range(11)]
        assert model["zeros"]["layers"][kind] == pytest.approx(shares)
        assert len(set(shares)) > 5
    sizes = np.array([codes.size for codes, _ in tiny.codes.values()])
    zeros = sum(int((codes == 0).sum()) for codes, _ in tiny.codes.values())
    assert model["zeros"]["all"] == pytest.approx(zeros / sizes.sum())
    assert model["tokenizer"] == "BPE, 256 tokens"


def test_zeros_of_latent_weights_are_those_they_will_have(tmp_path, capsys):
    tiny = write_checkpoint(tmp_path / "model", latent=True)
    model = facts_of(tiny.path, capsys)
    assert model["storage"] == "latent"
    shares = [float((tiny.codes[f"model.layers.{i}.mlp.up_proj"][0] == 0).mean()) for i in range(2)]
    assert model["zeros"]["layers"]["mlp.up_proj"] == pytest.approx(shares, abs=0.01)


def test_a_dense_model_has_no_codes(tmp_path, capsys):
    model = facts_of(write_checkpoint(tmp_path / "model", linear="dense").path, capsys)
    assert (model["storage"], model["scales"]) == ("dense", None)
    assert "zeros" not in model
    assert model["bits per weight"]["dense linears"] == 16


def test_a_model_is_shown(folder, capsys):
    assert main(["info", str(folder)]) == 0
    text = capsys.readouterr().out
    for words in ("packed", "ternary linears", "multiply the codes", "share of zeros", "self_attn.q_proj"):
        assert words in text


def test_lines_for_a_pipe_end_where_their_words_do(folder, capsys):
    assert main(["info", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [line.rstrip() for line in lines]
    assert sum(map(bool, lines)) > 20


def test_a_config_is_read_in_80_columns(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder.parent)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert main(["info", folder.name]) == 0
    text = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    block = re.search(r"^config +(.*?)^tokenizer", text, re.MULTILINE | re.DOTALL)
    assert block is not None
    lines = [line.strip() for line in block[1].splitlines()]
    assert len(lines) > 3
    # Lines end between fields, each its name and its value; what a model has not is not there.
    fields = dict(field.rsplit(" ", 1) for line in lines for field in line.rstrip(",").split(", "))
    assert fields.items() > {"hidden_size": "32", "linear": "ternary", "tie_word_embeddings": "yes"}.items()
    assert "no" not in fields.values()


def test_layers_alike_are_counted(tmp_path, capsys):
    facts = facts_of(write_checkpoint(tmp_path / "model").path, capsys)
    mixers = [*["ssd"] * 30, "attention", "ssd"]
    show_model(Console(width=200), facts | {"config": {"mixers": mixers, "experts": {"count": 4, "heads": 2}}})
    out = capsys.readouterr().out
    assert "mixers 30 ssd attention ssd, experts (count 4, heads 2)" in out


def test_a_model_that_does_not_run_here_is_shown(tmp_path, capsys):
    tiny = write_checkpoint(tmp_path / "model")
    fields = tiny.config | {"model_type": "unheard_of", "architectures": ["UnheardOfModel"]}
    (tiny.path / "config.json").write_text(json.dumps(fields))
    model = facts_of(tiny.path, capsys)
    assert model["architecture"] == "UnheardOfModel"
    assert model["runs here"].startswith("no: [config] 'model_type' must be")
    assert model["config"]["hidden_size"] == 48
    up = float((tiny.codes["model.layers.1.mlp.up_proj"][0] == 0).mean())
    assert model["zeros"]["layers"]["mlp.up_proj"][1] == pytest.approx(up)


def test_shards_are_one_model(tmp_path, capsys):
    tiny = write_checkpoint(tmp_path / "model")
    whole = facts_of(tiny.path, capsys)
    tensors = open_safetensors(tiny.path / "model.safetensors")
    names = list(tensors)
    files = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in files.items():
        save_safetensors(tiny.path / file, {name: tensors[name] for name in part})
    weight_map = {name: file for file, part in files.items() for name in part}
    (tiny.path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (tiny.path / "model.safetensors").unlink()
    model = facts_of(tiny.path, capsys)
    assert model["format"] == "folder of transformers, 2 safetensors files"
    assert (model["bytes"], model["zeros"]["all"]) == (whole["bytes"], whole["zeros"]["all"])


def test_a_safetensors_file_alone_is_shown(folder, capsys):
    model, file = facts_of(folder, capsys), facts_of(folder / "model.safetensors", capsys)
    assert (file["bytes"], file["zeros"]) == (model["bytes"], model["zeros"])
    assert file["runs here"].startswith("no")


@pytest.mark.parametrize("kind", ["TQ1_0", "TQ2_0", "I2_S"])
def test_a_gguf_file_is_shown(tmp_path, capsys, kind):
    rng = np.random.default_rng(0)
    codes = {f"blk.{i}.ffn_up.weight": rng.integers(-1, 2, (4, 256)).astype(np.int8) for i in range(12)}
    tokens = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": ["a", "b"], "tokenizer.chat_template": "x"}
    path = write_gguf(tmp_path / "model.gguf", codes, kind, **tokens, **{"unheard-of.block_count": np.uint32(12)})
    model = facts_of(path, capsys)
    assert model["architecture"] == "unheard-of"
    assert model["runs here"].startswith("no: [gguf]")
    assert kind in model["scales"]
    assert model["config"]["unheard-of.block_count"] == 12
    assert (model["tokenizer"], model["chat template"]) == ("gpt2 (no pre-tokenizer named), 2 tokens", True)
    assert model["zeros"]["layers"]["ffn_up"] == pytest.approx([float((c == 0).mean()) for c in codes.values()])
    assert model["parameters"] == 12 * 4 * 256


def test_a_gguf_file_that_runs_here_says_so(tmp_path, capsys):
    folder = write_random(tmp_path / "folder", Size(64, 256, 256, 1, 2, 1), hidden_act="silu")
    assert main(["convert", str(folder), str(tmp_path / "model.gguf")]) == 0
    capsys.readouterr()
    before, model = facts_of(folder, capsys), facts_of(tmp_path / "model.gguf", capsys)
    assert (model["runs here"], model["storage"], model["architecture"]) == ("yes", "packed", "bitnet")
    assert model["zeros"]["all"] == before["zeros"]["all"]
    assert model["config"]["hidden_size"] == 256


def write_keras(path: Path, packed: bool) -> dict[str, np.ndarray]:
    """A .keras file of two ternary layers, as `thrifty.keras` and Keras lay it out; the codes of each."""
    import io
    import zipfile

    import h5py

    from thrifty.checkpoint import base3

    rng = np.random.default_rng(0)
    codes = {name: rng.integers(-1, 2, (30, 7 * 4)).astype(np.int8) for name in ("dense_mml", "dense_mml_1")}
    memory = io.BytesIO()
    with h5py.File(memory, "w") as file:
        for name, matrix in codes.items():
            values = (
                {"kernel_packed": base3.encode(matrix), "kernel_shape": matrix.shape, "kernel_scale": np.float32(0.5)}
                if packed
                else {"kernel": (matrix.T * np.float32(0.5))}
            )
            for key, value in (values | {"bias": np.zeros(30, np.float32)}).items():
                file[f"layers/{name}/vars/{key}"] = value
    layers = [{"class_name": "DenseMML", "config": {"name": name}} for name in codes]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("config.json", json.dumps({"class_name": "Sequential", "config": {"layers": layers}}))
        archive.writestr("metadata.json", json.dumps({"keras_version": "3.15.1"}))
        archive.writestr("model.weights.h5", memory.getvalue())
    return codes


@pytest.mark.parametrize("packed", [True, False])
def test_a_keras_file_is_shown(tmp_path, capsys, packed):
    pytest.importorskip("h5py")
    codes = write_keras(tmp_path / "net.keras", packed)
    model = facts_of(tmp_path / "net.keras", capsys)
    assert (model["format"], model["layers"]) == ("Keras file (keras 3.15.1)", {"DenseMML": 2})
    assert model["storage"] == ("packed" if packed else "latent")
    assert model["weights"]["ternary layers"] == 2 * 30 * 28
    assert model["zeros"]["layers"]["dense_mml"] == pytest.approx([(c == 0).mean() for c in codes.values()], abs=1e-9)
    if packed:
        assert model["bytes"]["ternary layers"] == 2 * (168 + 16 + 4)


def test_without_h5py_a_keras_file_shows_its_layers(tmp_path, capsys, monkeypatch):
    pytest.importorskip("h5py")
    write_keras(tmp_path / "net.keras", True)
    monkeypatch.setitem(sys.modules, "h5py", None)
    model = facts_of(tmp_path / "net.keras", capsys)
    assert model["layers"] == {"DenseMML": 2}
    assert "h5py" in model["unread"]
    assert main(["info", str(tmp_path / "net.keras")]) == 0
    assert "h5py" in capsys.readouterr().out


def test_a_chart_keeps_within_80_columns_and_one_scale():
    layers = {"self_attn.q_proj": [i / 100 for i in range(80)], "self_attn.attn_sub_norm.x": [0.5]}
    text = zeros_chart({"all": 0.4, "layers": layers})
    assert max(map(len, text.splitlines())) <= 80
    assert "from ▁ = 0.0% to █ = 79.0%" in text
    *_, ramp, one = text.splitlines()
    columns = ramp.split()[-1]
    assert len(columns) <= COLUMNS
    assert (columns[0], columns[-1]) == ("▁", "█")
    assert list(columns) == sorted(columns)
    assert one.split()[-1] == "▅"
    assert zeros_chart({"all": 0.4, "layers": layers}, ascii_only=True).isascii()
    means = zeros_chart({"all": 0.4, "layers": {"x": [0.2, 0.6] * COLUMNS, "y": [0.0, 0.7]}}).splitlines()[2]
    assert means.split() == ["x", "40.0%", "▅" * COLUMNS]


def test_what_is_no_model_is_named(tmp_path, capsys):
    assert error_of(tmp_path, capsys).startswith("error: [checkpoint]")
    assert "none does not exist" in error_of(tmp_path / "none", capsys)
    (tmp_path / "notes.txt").write_text("x")
    assert "a model is a folder or a file in .gguf, .keras, .safetensors; got" in error_of(
        tmp_path / "notes.txt", capsys
    )


@pytest.mark.parametrize("packed", [True, False])
def test_a_damaged_keras_file_is_shown_or_refused(tmp_path, capsys, packed):
    pytest.importorskip("h5py")
    write_keras(tmp_path / "net.keras", packed)
    whole, rng = (tmp_path / "net.keras").read_bytes(), np.random.default_rng(0)
    outcomes = set()
    for _ in range(60):
        data = np.frombuffer(whole, np.uint8).copy()
        data[rng.integers(0, len(data), 3)] = rng.integers(0, 256, 3)
        (tmp_path / "net.keras").write_bytes(
            data[: rng.integers(1, len(data)) if rng.random() < 0.2 else None].tobytes()
        )
        outcomes.add(main(["info", str(tmp_path / "net.keras"), "--json"]))
    assert outcomes <= {0, 2}
    assert 2 in outcomes


def test_damage_is_one_sentence(tmp_path, capsys, folder):
    codes = np.zeros((4, 256), np.int8)
    whole = write_gguf(tmp_path / "model.gguf", {"blk.0.ffn_up.weight": codes}).read_bytes()
    (tmp_path / "short.gguf").write_bytes(whole[:-40])
    assert "[gguf]" in error_of(tmp_path / "short.gguf", capsys)
    (tmp_path / "digit.gguf").write_bytes(whole[:-66] + b"\xff" * 64 + whole[-2:])
    assert "tensor 'blk.0.ffn_up.weight' of" in error_of(tmp_path / "digit.gguf", capsys)
    tensors = {"x.weight": Tensor.of(np.full((3, 5), 3, np.uint8)), "x.weight_scale": Tensor.of(np.ones(1, np.float32))}
    save_safetensors(tmp_path / "code.safetensors", tensors)
    assert "'x.weight' of" in error_of(tmp_path / "code.safetensors", capsys)
    (tmp_path / "short.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-1])
    assert "[safetensors]" in error_of(tmp_path / "short.safetensors", capsys)
    (tmp_path / "net.keras").write_bytes(b"PK")
    assert "[info] a .keras file must be a whole archive" in error_of(tmp_path / "net.keras", capsys)
