import json
import os

import numpy as np
import pytest
from tiny_checkpoints import PACKED, shapes, write_checkpoint

from thrifty import ThriftyError
from thrifty.checkpoint import Tensor, expected_tensors, open_folder, open_safetensors, read_config, save_safetensors
from thrifty.checkpoint.folder import unpack_row_block
from thrifty.spec import ROW_BLOCK, pack

#: The rotary scaling of Llama 3.1.
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 8192}


def edit_config(path, **fields):
    config = json.loads((path / "config.json").read_text())
    config |= fields
    (path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v != "absent"}))


def edit_tensors(path, change):
    tensors = {name: Tensor(t.dtype, t.data.copy()) for name, t in open_safetensors(path / "model.safetensors").items()}
    change(tensors)
    save_safetensors(path / "model.safetensors", tensors)


@pytest.fixture
def folder(tmp_path):
    return write_checkpoint(tmp_path / "model").path


@pytest.mark.parametrize("latent", [False, True])
@pytest.mark.parametrize("linear", ["ternary", "binary"])
@pytest.mark.parametrize("rows", [80, 81, 83])
def test_codes_and_scales_are_what_was_written(tmp_path, latent, linear, rows):
    tiny = write_checkpoint(tmp_path / "model", latent=latent, linear=linear, intermediate_size=rows)
    opened = open_folder(tiny.path)
    for name, (codes, scale) in tiny.codes.items():
        read, read_scale = opened.codes(name, codes.shape[0])
        np.testing.assert_array_equal(read, codes, strict=True)
        assert read_scale == scale
    for name, values in tiny.floats.items():
        np.testing.assert_array_equal(opened.float32(name), values, strict=True)


def test_a_stored_scale_of_latent_weights_is_taken(tmp_path):
    tiny = write_checkpoint(tmp_path / "model", latent=True)
    name = "model.layers.0.mlp.down_proj"
    scale = Tensor.of(np.full(1, 0.5, np.float32), "BF16")
    edit_tensors(tiny.path, lambda tensors: tensors.update({f"{name}.weight_scale": scale}))
    opened = open_folder(tiny.path)
    codes, read = opened.codes(name, 48)
    assert read == 0.5
    np.testing.assert_array_equal(codes, np.clip(np.rint(opened.float32(f"{name}.weight") / 0.5), -1, 1))


def test_row_blocks_equal_the_spec():
    rng = np.random.default_rng(0)
    for rows, cols in [(1, 1), (3, 5), (4, 4), (257, 63), (500, 7)]:
        codes = rng.integers(-1, 2, (rows, cols)).astype(np.int8)
        read = unpack_row_block(pack(ROW_BLOCK, codes), rows)
        assert read is not None
        np.testing.assert_array_equal(read, codes, strict=True)


@pytest.mark.parametrize("digit", range(4))
def test_code_three_is_refused(folder, digit):
    name = "model.layers.1.mlp.up_proj"

    def spoil(tensors):
        tensors[f"{name}.weight"].data[3, 5] |= 3 << (2 * digit)

    edit_tensors(folder, spoil)
    with pytest.raises(ThriftyError, match=f"'{name}.weight'.* has 3"):
        open_folder(folder).codes(name, 80)


def test_a_scale_whose_reciprocal_is_infinite_is_refused(tmp_path):
    path = write_checkpoint(tmp_path / "model", quantization_config=PACKED | {"linear_class": "bitlinear"}).path
    name = "model.layers.1.mlp.up_proj"
    scale = Tensor.of(np.full(1, 1e-45, np.float32), "F32")
    edit_tensors(path, lambda tensors: tensors.update({f"{name}.weight_scale": scale}))
    with pytest.raises(ThriftyError, match="positive and finite"):
        open_folder(path).codes(name, 80)


@pytest.mark.parametrize("value", [0, -1, np.nan, np.inf])
def test_an_invalid_scale_is_refused(folder, value):
    name = "model.layers.1.mlp.up_proj"
    scale = Tensor.of(np.full(1, value, np.float32), "F32")
    edit_tensors(folder, lambda tensors: tensors.update({f"{name}.weight_scale": scale}))
    with pytest.raises(ThriftyError, match="positive and finite"):
        open_folder(folder).codes(name, 80)


def test_scalar_scales_are_read(folder):
    name = "model.layers.1.mlp.up_proj.weight_scale"
    edit_tensors(folder, lambda t: t.update({name: Tensor(t[name].dtype, t[name].data.reshape(()))}))
    assert open_folder(folder).codes("model.layers.1.mlp.up_proj", 80)[1] > 0


def test_shards(tmp_path):
    tiny = write_checkpoint(tmp_path / "model")
    whole = open_safetensors(tiny.path / "model.safetensors")
    names = sorted(whole)
    parts = {"a.safetensors": names[:9], "b.safetensors": names[9:]}
    for file, part in parts.items():
        save_safetensors(tiny.path / file, {name: whole[name] for name in part})
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (tiny.path / "model.safetensors.index.json").write_text(json.dumps(index))
    os.remove(tiny.path / "model.safetensors")
    assert open_folder(tiny.path).tensors.keys() == whole.keys()
    index["weight_map"][names[0]] = "../a.safetensors"
    (tiny.path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ThriftyError, match="shards must lie"):
        open_folder(tiny.path)
    (tiny.path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ThriftyError, match="weight_map"):
        open_folder(tiny.path)


def test_names_agree_with_the_shapes_written_out(folder):
    tiny = write_checkpoint(folder, tie_word_embeddings=False)
    linears, norms = shapes(tiny.config)
    expected = expected_tensors(read_config(folder / "config.json"))
    layer = {name.removeprefix("model.layers.0.") for name in expected if name.startswith("model.layers.0.")}
    assert layer == {f"{n}.weight" for n in [*linears, *norms]} | {f"{n}.weight_scale" for n in linears}
    assert {name for name in expected if ".layers." not in name} == {
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
    }


def test_tensors_that_do_not_match_the_config(folder):
    cases = [
        (lambda t: t.pop("model.norm.weight"), "'model.norm.weight' is absent"),
        (lambda t: t.update(more=Tensor.of(np.zeros(3, np.float32))), "'more' is not part"),
        (lambda t: t.update({"model.norm.weight": Tensor.of(np.zeros(3, np.float32))}), r"shape \[48\] and has \[3\]"),
        (lambda t: t.update({"model.norm.weight": Tensor.of(np.zeros(48, np.int64))}), "must be a float"),
        (
            lambda t: t.update({"model.layers.0.mlp.up_proj.weight": Tensor.of(np.zeros((80, 48), np.float32))}),
            "must be packed",
        ),
    ]
    original = (folder / "model.safetensors").read_bytes()
    for change, message in cases:
        edit_tensors(folder, change)
        with pytest.raises(ThriftyError, match=message):
            open_folder(folder)
        (folder / "model.safetensors").write_bytes(original)
    open_folder(folder)


@pytest.mark.parametrize(
    "fields",
    [
        {"hidden_size": 64},
        {"vocab_size": 301},
        {"num_hidden_layers": 3},
        {"num_hidden_layers": 1},
        {"num_hidden_layers": 10**12},
        {"num_key_value_heads": 4},
        {"tie_word_embeddings": False},
        {"attention_bias": True},
        {"intermediate_size": 84},
        {"quantization_config": PACKED | {"quantization_mode": "online"}},
    ],
)
def test_a_config_that_does_not_match_its_tensors(folder, fields):
    edit_config(folder, **fields)
    with pytest.raises(ThriftyError, match=r"\[checkpoint\] tensors must match config\.json; in .*model"):
        open_folder(folder)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"hidden_size": "absent"}, "hidden_size"),
        ({"hidden_size": -8}, "hidden_size"),
        ({"hidden_size": 50}, "num_attention_heads"),
        ({"hidden_size": True}, "hidden_size"),
        ({"hidden_size": 2.5}, "hidden_size"),
        ({"head_dim": 7}, "head_dim"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"model_type": "gpt2"}, "model_type"),
        ({"model_type": "absent"}, "model_type"),
        ({"hidden_act": "mish"}, "hidden_act"),
        ({"rms_norm_eps": 0}, "rms_norm_eps"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type"),
        ({"rope_parameters": LLAMA3 | {"factor": None}}, "factor"),
        ({"rope_parameters": LLAMA3 | {"low_freq_factor": 4.0}}, "high_freq_factor"),
        (
            {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 10**400}},
            "original_max_position_embeddings",
        ),
        (
            {"rope_parameters": {"rope_type": "dynamic", "original_max_position_embeddings": "9"}},
            "original_max_position_embeddings",
        ),
        ({"rope_parameters": {"rope_theta": -1}}, "rope_theta"),
        ({"rope_parameters": [1]}, "rope_parameters"),
        ({"model_type": "thrifty", "token_mixers": ["attention", "mamba"]}, "token_mixers"),
        ({"model_type": "thrifty", "token_mixers": ["attention", "ssd", "mlgru"]}, "token_mixers"),
        ({"model_type": "cheems"}, "token_mixers"),
        ({"model_type": "doge", "keep_window_size": 0}, "keep_window_size"),
        ({"model_type": "doge", "sliding_window": 8}, "sliding_window"),
        ({"model_type": "doge", "is_moe": True, "num_experts": 50}, "num_experts"),
        ({"model_type": "doge", "is_moe": True, "num_experts": 49}, "num_experts_per_tok"),
        ({"model_type": "doge", "is_moe": True, "num_experts": 4096, "router_layout": "legacy"}, "router_layout"),
        (
            {"model_type": "cheems", "token_mixers": ["dynamic_mask"], "dynamic_mask_selection": "ratio_legacy"},
            "dynamic_mask_selection",
        ),
        ({"model_type": "thrifty", "linear": "fp4"}, "linear"),
        ({"model_type": "thrifty", "norm_placement": "post"}, "norm_placement"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quant_method"),
        ({"quantization_config": PACKED | {"linear_class": "other"}}, "linear_class"),
        ({"quantization_config": PACKED | {"modules_to_not_convert": ["lm_head", "q_proj"]}}, "modules_to_not_convert"),
        ({"quantization_config": PACKED | {"modules_to_not_convert": []}}, "modules_to_not_convert"),
    ],
)
def test_a_config_that_cannot_be_run_names_the_field(folder, fields, field):
    edit_config(folder, **fields)
    with pytest.raises(ThriftyError, match=rf"\[config\] '{field}' must .*config\.json"):
        open_folder(folder)


def test_rope_theta_of_either_age(folder):
    for fields, theta in [
        ({"rope_parameters": {"rope_theta": 7.0, "rope_type": "default"}}, 7),
        ({"rope_parameters": None, "rope_theta": 8.0}, 8),
        ({"rope_parameters": None, "rope_theta": None}, 500_000),
    ]:
        edit_config(folder, **fields)
        assert read_config(folder / "config.json").rope_theta == theta


def test_folders_that_are_none(tmp_path, folder):
    with pytest.raises(ThriftyError, match="does not exist"):
        open_folder(tmp_path / "nowhere")
    with pytest.raises(ThriftyError, match="is a file"):
        open_folder(folder / "config.json")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ThriftyError, match=r"must have config\.json"):
        open_folder(tmp_path / "empty")
    for content in ("{", "[]", "\udcff", '"a"', "[" * 100_000):
        (folder / "config.json").write_bytes(content.encode("utf-8", "surrogateescape"))
        with pytest.raises(ThriftyError, match=r"config\.json must"):
            open_folder(folder)
