import json
import os
import subprocess
import sys
import textwrap
from typing import Any

import numpy as np
import pytest
from tiny_checkpoints import write_checkpoint

from thrifty.checkpoint.folder import TEXT_FILES
from thrifty.cli import main
from thrifty.cli.pack import pack_folder
from thrifty.runtime import load

torch = pytest.importorskip("torch", exc_type=ImportError)
pytest.importorskip("transformers", exc_type=ImportError)


@pytest.fixture
def latent(tmp_path):
    """A trained folder as `thrifty train` leaves it."""
    from thrifty.models import ThriftyConfig, ThriftyForCausalLM, round_dense_parameters

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "max_position_embeddings": 64, "eos_token_id": 256}
    model = ThriftyForCausalLM(ThriftyConfig(**sizes))
    round_dense_parameters(model)
    folder = write_checkpoint(tmp_path / "unused").path.rename(tmp_path / "trained")
    model.save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "x"}))
    return folder


def torch_codes(folder) -> dict[str, tuple[np.ndarray, float]]:
    """Codes and scales that the training forward takes."""
    from thrifty import ops
    from thrifty.models import ThriftyForCausalLM
    from thrifty.nn import BitLinear

    model = ThriftyForCausalLM.from_pretrained(folder, dtype=torch.float32)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, BitLinear)}
    taken = {name: ops.quantize_weight(module.weight) for name, module in layers.items()}
    return {name: (codes.numpy(), scale.item()) for name, (codes, scale) in taken.items()}


def test_packs_the_codes_of_the_training_forward(latent, tmp_path, capsys):
    from thrifty.checkpoint import open_folder

    assert main(["pack", str(latent)]) == 0
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "times smaller" in printed.err
    packed = open_folder(tmp_path / "trained-packed")
    expected = torch_codes(latent)
    assert len(expected) == 14
    for name, (codes, scale) in expected.items():
        read, read_scale = packed.codes(name, codes.shape[0])
        np.testing.assert_array_equal(read, codes, strict=True)
        assert read_scale == scale
    assert {"tokenizer.json", "tokenizer_config.json"} <= set(os.listdir(packed.path))
    runtime, tokens = load(packed.path), list(range(50))
    np.testing.assert_array_equal(runtime.logits(tokens), load(latent).logits(tokens))
    assert runtime.generate("ab", max_new_tokens=4) == load(latent).generate("ab", max_new_tokens=4)


def test_dtype_and_packing_again(latent, tmp_path):
    from thrifty.checkpoint import open_safetensors

    for dtype, stored in (("float32", "F32"), ("bfloat16", "BF16")):
        assert main(["pack", str(latent), str(tmp_path / dtype), "--dtype", dtype]) == 0
        assert open_safetensors(tmp_path / dtype / "model.safetensors")["model.norm.weight"].dtype == stored
    assert main(["pack", str(tmp_path / "bfloat16"), str(tmp_path / "again")]) == 0
    again, once = (open_safetensors(tmp_path / name / "model.safetensors") for name in ("again", "bfloat16"))
    assert again.keys() == once.keys()
    for name in once:
        np.testing.assert_array_equal(again[name].data, once[name].data)


def test_an_existing_folder_is_replaced_only_when_forced(latent, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")
    assert main(["pack", str(latent), str(tmp_path / "out")]) == 2
    assert "exists" in capsys.readouterr().err
    assert os.listdir(tmp_path / "out") == ["mine"]
    assert main(["pack", str(latent), str(tmp_path / "out"), "--force"]) == 2
    assert "only a model's folder is replaced" in capsys.readouterr().err
    (tmp_path / "out" / "mine").rename(tmp_path / "out" / "config.json")
    assert main(["pack", str(latent), str(tmp_path / "out"), "--force"]) == 0
    assert "model.safetensors" in os.listdir(tmp_path / "out")
    assert main(["pack", str(latent), str(latent), "--force"]) == 2
    assert "folder of its own" in capsys.readouterr().err


def test_texts_of_every_tokenizer_come_along(latent, tmp_path):
    texts = {name.replace("*", "tool_use"): f"the {name}" for name in TEXT_FILES if "config" not in name}
    (latent / "additional_chat_templates").mkdir()
    for name, text in texts.items():
        (latent / name).write_text(text)
    assert {"tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json"} < texts.keys()
    assert main(["pack", str(latent), str(tmp_path / "packed")]) == 0
    assert main(["convert", str(tmp_path / "packed"), str(tmp_path / "again")]) == 0
    for folder in ("packed", "again"):
        assert {name: (tmp_path / folder / name).read_text() for name in texts} == texts


def test_a_full_disk_leaves_nothing(latent, tmp_path, monkeypatch, capsys):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert main(["pack", str(latent), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "out could not be written: no space left on device; free some space" in error
    assert sorted(os.listdir(tmp_path)) == ["trained"]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no resource limits")
def test_tensors_that_the_system_refuses_are_one_sentence_about_the_output(latent, tmp_path):
    code = """
    import resource, signal, sys
    from thrifty.cli import main
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
    sys.exit(main(sys.argv[1:]))
    """
    output = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), "pack", str(latent), str(output)], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert f"{output} could not be written: file too large; raise the limit on file sizes" in done.stderr
    assert os.listdir(tmp_path) == ["trained"]


def test_dense_linears_are_packed_at_16_bits(tmp_path):
    from thrifty.checkpoint import open_folder
    from thrifty.models import DogeConfig, DogeForCausalLM, round_dense_parameters
    from thrifty.runtime import load

    sizes: dict[str, Any] = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    model = DogeForCausalLM(DogeConfig(**sizes, num_attention_heads=2, max_position_embeddings=64))
    round_dense_parameters(model)
    model.save_pretrained(tmp_path / "doge")
    assert main(["pack", str(tmp_path / "doge")]) == 0
    packed = tmp_path / "doge-packed"
    assert {tensor.dtype for tensor in open_folder(packed).tensors.values()} == {"BF16"}
    np.testing.assert_array_equal(load(packed).logits([1, 2, 3]), load(tmp_path / "doge").logits([1, 2, 3]))


def test_what_cannot_be_packed(tmp_path, capsys):
    dense = write_checkpoint(tmp_path / "dense", linear="dense").path
    for arguments, message in [
        ([str(tmp_path / "nowhere")], "does not exist"),
        ([str(dense), "--dtype", "int8"], "dtype must be one of"),
    ]:
        assert main(["pack", *arguments]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("family", "linear", "kind"),
    [
        ("Cheems", "dense", "cheems"),
        ("Cheems", "ternary", "cheems"),
        ("MatMulFree", "ternary", "matmulfree"),
        ("Doge", "dense", "doge"),
        ("Doge", "ternary", "thrifty"),
    ],
)
def test_a_packed_family_keeps_its_name(tmp_path, family, linear, kind):
    from transformers import AutoModelForCausalLM

    from thrifty import models

    sizes: dict[str, Any] = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 8}
    sizes |= {"num_attention_heads": 2, "max_position_embeddings": 64, "linear": linear}
    model = getattr(models, f"{family}ForCausalLM")(getattr(models, f"{family}Config")(**sizes)).eval()
    models.round_dense_parameters(model)
    model.save_pretrained(tmp_path / "trained")
    pack_folder(tmp_path / "trained", tmp_path / "packed")
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    names = {"cheems": "Cheems", "matmulfree": "MatMulFree", "doge": "Doge", "thrifty": "Thrifty"}
    assert (config["model_type"], config["architectures"]) == (kind, [f"{names[kind]}ForCausalLM"])
    tokens = torch.arange(3, 40)[None]
    with torch.no_grad():
        expected = model(tokens).logits
        for load_model in (models.ThriftyForCausalLM, AutoModelForCausalLM):
            loaded: Any = load_model.from_pretrained(tmp_path / "packed", dtype=torch.float32)
            torch.testing.assert_close(loaded.eval()(tokens).logits, expected, rtol=1e-4, atol=1e-4)
    assert np.abs(load(tmp_path / "packed").logits(tokens[0].tolist()) - expected[0].numpy()).max() < 1e-4
