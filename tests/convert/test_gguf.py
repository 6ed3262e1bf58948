"""GGUF files: written, read by the `gguf` package, run here, and led back."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from tiny_checkpoints import write_checkpoint

from thrifty import ThriftyError, native
from thrifty.checkpoint import Tensor, open_folder, open_model, open_safetensors, save_safetensors
from thrifty.checkpoint.gguf import Block, TensorToWrite, open_gguf, save_gguf
from thrifty.checkpoint.names import EMBEDDING
from thrifty.convert import to_gguf, to_transformers
from thrifty.runtime import load
from thrifty.spec import GGUF_TERNARY, dequantize_q8_0, gguf_encode, quantize_q8_0

SIZES: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512}
TOKENS = np.random.default_rng(5).integers(0, 300, 60).tolist()
SOURCES = {
    "bitnet": {},
    "llama": {"model_type": "llama", "tie_word_embeddings": False},
    "latent": {"latent": True},
}


def source(path: Path, name: str) -> Path:
    return write_checkpoint(path, **SIZES, **SOURCES[name]).path


def copied(file: Path, output: Path, metadata: dict[str, Any] | None = None, **blocks: Block) -> Path:
    """A GGUF file with other metadata, or other tensors under some names (dots as underscores)."""
    opened = open_gguf(file)
    tensors = {name: blocks.get(name.replace(".", "_"), block) for name, block in opened.tensors.items()}

    def write(name: str, block: Block) -> TensorToWrite:
        return TensorToWrite(name, block.kind, block.shape, lambda: block.data)

    save_gguf(output, opened.metadata | (metadata or {}), [write(*item) for item in tensors.items()])
    return output


@pytest.fixture
def file(tmp_path):
    to_gguf(open_folder(source(tmp_path / "source", "bitnet")), tmp_path / "model.gguf")
    return tmp_path / "model.gguf"


@pytest.mark.parametrize("weight_type", ["TQ1_0", "TQ2_0"])
@pytest.mark.parametrize("name", SOURCES)
def test_there_and_back_the_runtime_computes_the_same(tmp_path, name, weight_type):
    path = source(tmp_path / "source", name)
    to_gguf(open_folder(path), tmp_path / "model.gguf", weight_type, "BF16")
    to_transformers(open_model(tmp_path / "model.gguf"), tmp_path / "back")
    expected = load(path)
    for again in (load(tmp_path / "model.gguf"), load(tmp_path / "back")):
        np.testing.assert_array_equal(again.logits(TOKENS), expected.logits(TOKENS))
        assert again.generate("hello", max_new_tokens=9) == expected.generate("hello", max_new_tokens=9)
        assert again.encode("héllo <|end|>") == expected.encode("héllo <|end|>")


def test_there_and_back_codes_scales_and_texts_are_the_same_bits(tmp_path):
    path = source(tmp_path / "source", "bitnet")
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [256], "max_new_tokens": 5}))
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>", "chat_template": "{{ messages }}"}))
    to_gguf(open_folder(path), tmp_path / "model.gguf", "TQ1_0", "BF16")
    to_transformers(open_model(tmp_path / "model.gguf"), tmp_path / "back")
    before, after = (open_safetensors(folder / "model.safetensors") for folder in (path, tmp_path / "back"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        np.testing.assert_array_equal(after[name].float32(), tensor.float32())
    for name in ("tokenizer.json", "generation_config.json", "tokenizer_config.json"):
        assert json.loads((tmp_path / "back" / name).read_text()) == json.loads((path / name).read_text()), name
    configs = [json.loads((folder / "config.json").read_text()) for folder in (path, tmp_path / "back")]
    differ = {key for key in configs[0] if configs[0][key] != configs[1].get(key)}
    assert differ == {"quantization_config"}


@pytest.mark.parametrize("weight_type", ["TQ1_0", "TQ2_0"])
def test_a_gguf_file_comes_back_through_a_folder_and_goes_on_as_another(file, tmp_path, weight_type):
    said = {"general.author": "someone", "general.license": "apache-2.0", "general.name": "tiny"}
    said["tokenizer.chat_template"] = "{{ messages }}"
    to_gguf(file, tmp_path / "plain.gguf", weight_type, "BF16")
    first = copied(
        tmp_path / "plain.gguf", tmp_path / "first.gguf", said | {"tokenizer.chat_template": "{{ messages }}"}
    )
    to_transformers(first, tmp_path / "folder")
    to_gguf(tmp_path / "folder", tmp_path / "again.gguf", weight_type, "BF16")
    to_gguf(first, tmp_path / "direct.gguf", weight_type, "BF16")
    before = open_gguf(first)
    for name in ("again", "direct"):
        after = open_gguf(tmp_path / f"{name}.gguf")
        for tensor, block in before.tensors.items():
            assert (after.tensors[tensor].kind, after.tensors[tensor].shape) == (block.kind, block.shape)
            np.testing.assert_array_equal(after.tensors[tensor].data, block.data, err_msg=tensor)
        for key, value in before.metadata.items():
            if key.startswith(("general.", "tokenizer.", "bitnet.")):
                np.testing.assert_array_equal(after.metadata[key], value, err_msg=key)


@pytest.mark.parametrize("scale", [1e-9, 70_000.0, 0.1])
def test_a_scale_that_float16_does_not_hold_is_kept(tmp_path, scale):
    path = source(tmp_path / "source", "bitnet")
    tensors = open_safetensors(path / "model.safetensors")
    name = "model.layers.1.mlp.up_proj"
    value = Tensor.of(np.full(1, scale, np.float32))
    save_safetensors(path / "model.safetensors", tensors | {f"{name}.weight_scale": value})
    if scale == 0.1:
        to_gguf(open_folder(path), tmp_path / "model.gguf")
        assert open_model(tmp_path / "model.gguf").codes(name, 512)[1] == np.float32(scale)
        to_transformers(open_model(tmp_path / "model.gguf"), tmp_path / "back")
        assert open_folder(tmp_path / "back").codes(name, 512)[1] == np.float32(scale)
        return
    with pytest.raises(ThriftyError, match="scale"):
        to_gguf(open_folder(path), tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()


def test_the_gguf_package_reads_the_weights(file):
    opened = open_model(file)
    reader = gguf.GGUFReader(file)
    for tensor in reader.tensors:
        if tensor.name == "blk.1.ffn_down.weight":
            codes, scale = opened.codes("model.layers.1.mlp.down_proj", 256)
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            np.testing.assert_array_equal(values, codes * scale)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert (fields["general.architecture"], fields["bitnet.block_count"]) == ("bitnet", 2)
    assert fields["tokenizer.ggml.pre"] == "gpt-2"


def test_architecture_llama_has_rotary_pairs_as_neighbours(tmp_path):
    to_gguf(open_folder(source(tmp_path / "source", "llama")), tmp_path / "model.gguf", head_type="F32")
    opened, blocks = open_model(tmp_path / "model.gguf"), open_gguf(tmp_path / "model.gguf").tensors
    codes, scale = opened.codes("model.layers.0.self_attn.k_proj", 128)
    turned = codes.reshape(2, 2, 32, 256).swapaxes(1, 2).reshape(codes.shape)
    np.testing.assert_array_equal(blocks["blk.0.attn_k.weight"].data, gguf_encode("TQ2_0", turned, float(scale)))


def test_i2_s_of_microsofts_fork_is_read(file, tmp_path):
    opened, blocks = open_model(file), {}
    for layer in range(2):
        for ours, theirs in (
            ("q_proj", "attn_q"),
            ("k_proj", "attn_k"),
            ("v_proj", "attn_v"),
            ("o_proj", "attn_output"),
        ):
            rows = 128 if ours in ("k_proj", "v_proj") else 256
            codes, scale = opened.codes(f"model.layers.{layer}.self_attn.{ours}", rows)
            data = gguf_encode("I2_S", codes, float(scale))
            blocks[f"blk_{layer}_{theirs}_weight"] = Block("I2_S", codes.shape, data)
    fork = copied(file, tmp_path / "fork.gguf", **blocks)
    np.testing.assert_array_equal(load(fork).logits(TOKENS), load(file).logits(TOKENS))


def test_what_llama_cpp_would_compute_otherwise_is_refused(tmp_path):
    fields = {
        "has relu2 where llama.cpp computes SiLU": {"hidden_act": "relu2"},
        "head is not the embedding": {"tie_word_embeddings": False},
        "are not ternary": {"linear": "binary"},
        r"have biases \(self_attn\.q_proj, ": {"attention_bias": True},
        "no attention and gated feed-forward": {"feed_forward": "mlp"},
        "multiple of 256 columns.*320": {"intermediate_size": 320},
    }
    for i, (reason, changed) in enumerate(fields.items()):
        path = write_checkpoint(tmp_path / str(i), **SIZES | changed).path
        with pytest.raises(ThriftyError, match=reason):
            to_gguf(open_folder(path), tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()
    to_gguf(open_folder(tmp_path / "0"), tmp_path / "model.gguf", any_activation=True)
    assert open_model(tmp_path / "model.gguf").config.hidden_act == "relu2"


def test_a_vocabulary_is_not_left_out_in_silence(tmp_path):
    path = source(tmp_path / "source", "bitnet")
    (path / "tokenizer.json").unlink()
    assert "no vocabulary" in to_gguf(open_folder(path), tmp_path / "model.gguf").notes[0]
    (path / "tokenizer.model").write_bytes(b"pieces")
    with pytest.raises(ThriftyError, match=r"tokenizer\.model alone"):
        to_gguf(open_folder(path), tmp_path / "other.gguf")


def test_mistral_comes_back_as_mistral(tmp_path):
    path = write_checkpoint(tmp_path / "source", **SIZES, model_type="llama").path
    config = json.loads((path / "config.json").read_text()) | {"model_type": "mistral"}
    (path / "config.json").write_text(json.dumps(config))
    to_gguf(open_folder(path), tmp_path / "model.gguf")
    fields = open_model(tmp_path / "model.gguf").json("config.json")
    assert (fields["model_type"], fields["architectures"]) == ("mistral", ["MistralForCausalLM"])


def test_a_file_that_is_there_stays(file):
    before = file.read_bytes()
    with pytest.raises(ThriftyError, match="must be new"):
        to_gguf(open_folder(file.parent / "source"), file)
    assert file.read_bytes() == before


def test_damaged_or_foreign_files_are_refused(file, tmp_path):
    def refused(match: str, metadata: dict[str, Any] | None = None, **blocks: Block) -> None:
        other = copied(file, tmp_path / "other.gguf", metadata, **blocks)
        with pytest.raises(ThriftyError, match=match):
            open_model(other).codes("model.layers.0.mlp.down_proj", 256)

    block = open_gguf(file).tensors["blk.0.ffn_down.weight"]
    three, scales = block.data.copy(), block.data.copy()
    three[7] |= 3
    scales[64:66] = np.frombuffer(np.float16(2).tobytes(), np.uint8)
    refused(r"down_proj\.weight", blk_0_ffn_down_weight=Block("TQ2_0", block.shape, three))
    refused("one scale", blk_0_ffn_down_weight=Block("TQ2_0", block.shape, scales))
    refused("must have shape", blk_0_ffn_down_weight=Block("TQ2_0", (512, 256), block.data))
    dense = np.zeros((256, 512), np.float16).view(np.uint8).reshape(-1)
    refused("all be ternary or all dense", blk_0_ffn_down_weight=Block("F16", block.shape, dense))
    refused("all be ternary or all dense", blk_0_attn_q_weight=Block("F16", (256, 256), dense[: 256 * 512]))
    embedding = np.resize(block.data, 300 * 66)
    refused("no tensors but the linears", token_embd_weight=Block("TQ2_0", (300, 256), embedding))
    for key, value in {"rope.dimension_count": 32, "attention.sliding_window": 16, "expert_count": 4}.items():
        refused(f"'bitnet.{key}' must be absent or", {f"bitnet.{key}": np.uint32(value)})
    refused("'bitnet.attention.scale' must be absent or", {"bitnet.attention.scale": np.float32(0.5)})
    refused("architectures read here", {"general.architecture": "mamba"})
    refused("'bitnet.block_count' must be a number", {"bitnet.block_count": "two"})
    refused("num_hidden_layers is 4000000000", {"bitnet.block_count": np.uint32(4_000_000_000)})
    refused("scales them", {"bitnet.rope.scaling.type": "yarn"})
    refused("must be a JSON object", {"thrifty.config": "[]"})
    refused("rounded from", {"thrifty.scale.model.layers.0.mlp.down_proj": np.float32(3)})


@pytest.mark.parametrize("library", ["native", "numpy"])
@pytest.mark.parametrize("name", ["bitnet", "llama"])
def test_an_embedding_and_a_head_in_q8_0_compute_what_their_floats_do(tmp_path, monkeypatch, name, library):
    if library == "numpy":
        monkeypatch.setattr(native._library, "find", lambda: (None, "taken away for a test"))
        native._library.load.cache_clear()
    try:
        to_gguf(open_folder(source(tmp_path / "source", name)), tmp_path / "model.gguf", head_type="Q8_0")
        model = open_model(tmp_path / "model.gguf")
        assert model.tensors[EMBEDDING].dtype == "Q8_0"
        assert model.tensors[EMBEDDING].shape == (300, 256)
        to_transformers(model, tmp_path / "floats", dtype="float32")
        for bits in (None, 8):
            stored, floats = (load(tmp_path / file, head_bits=bits) for file in ("model.gguf", "floats"))
            np.testing.assert_array_equal(stored.logits(TOKENS), floats.logits(TOKENS))
            assert stored.generate_tokens(TOKENS, max_new_tokens=9) == floats.generate_tokens(TOKENS, max_new_tokens=9)
        to_gguf(model, tmp_path / "again.gguf", head_type="Q8_0")
        first, second = (open_gguf(tmp_path / file).tensors for file in ("model.gguf", "again.gguf"))
        assert first.keys() == second.keys()
        for tensor, block in first.items():
            np.testing.assert_array_equal(second[tensor].data, block.data)
    finally:
        monkeypatch.undo()
        native._library.load.cache_clear()


def test_dense_linears_in_q8_0_compute_what_their_floats_do(tmp_path):
    path = write_checkpoint(tmp_path / "source", model_type="llama", tie_word_embeddings=False, **SIZES).path
    to_gguf(open_folder(path), tmp_path / "ternary.gguf")
    rng, metadata = np.random.default_rng(0), {"thrifty.config": "{}"}
    blocks: dict[str, dict[str, Block]] = {"Q8_0": {}, "F32": {}}
    for name, block in open_gguf(tmp_path / "ternary.gguf").tensors.items():
        if block.kind in GGUF_TERNARY:
            data = quantize_q8_0(rng.normal(size=block.shape).astype(np.float32) / 16)
            key = name.replace(".", "_")
            blocks["Q8_0"][key] = Block("Q8_0", block.shape, data)
            blocks["F32"][key] = Block("F32", block.shape, dequantize_q8_0(data, *block.shape))
    logits = []
    for kind, tensors in blocks.items():
        file = copied(tmp_path / "ternary.gguf", tmp_path / f"{kind}.gguf", metadata, **tensors)
        model = open_model(file)
        assert model.config.linear == "dense"
        assert model.tensors["model.layers.1.mlp.down_proj.weight"].dtype == kind
        logits.append(load(file).logits(TOKENS))
    np.testing.assert_array_equal(*logits)
