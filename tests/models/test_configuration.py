import json
from typing import Any

import pytest
from transformers import BitNetConfig as PlainConfig

from thrifty.errors import ThriftyError
from thrifty.models import BitNetConfig, ThriftyConfig


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 65}, "width 65 is not a multiple of 8 heads"),
        ({"num_key_value_heads": 3}, "query heads must be a multiple of kv heads; got 8 and 3"),
        ({"num_attention_heads": 0}, "got 0 and 0"),
        ({"head_dim": 7}, "head_dim must be even"),
        ({"linear": "int4"}, "linear must be one of ternary, binary, dense; got 'int4'"),
        ({"feed_forward": "moe"}, "feed_forward must be one of glu, mlp, cdmoe; got 'moe'"),
        ({"norm_placement": "post"}, "norm_placement must be one of sub_ln, pre; got 'post'"),
        ({"hidden_act": "tanh"}, "hidden_act must be one of silu"),
        ({"token_mixers": "mamba"}, "token_mixers must be of attention, dynamic_mask, mlgru, ssd; got"),
        ({"token_mixers": []}, "got an empty pattern"),
        ({"token_mixers": ["attention"] * 3}, "must repeat to 8 layers; got 3 entries"),
        ({"vocab_size": 0}, "vocab_size must be a positive integer; got 0"),
        ({"hidden_size": "big"}, "hidden_size must be a positive integer; got 'big'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "rope_type must be 'default'"),
    ],
)
def test_what_cannot_be_is_refused(fields, message):
    with pytest.raises(ThriftyError, match=message):
        ThriftyConfig(**fields)


def test_saved_and_read_again(tmp_path):
    for config in (
        ThriftyConfig(token_mixers=["attention"] * 4, linear="binary", rope_parameters={"rope_theta": 77.0}),
        BitNetConfig(norm_placement="pre"),
        BitNetConfig(),
    ):
        config.save_pretrained(tmp_path)
        again = type(config).from_pretrained(tmp_path)
        assert again.to_dict() == config.to_dict()
        assert again.rope_parameters == config.rope_parameters


def test_transformers_own_config_reads_ours(tmp_path):
    BitNetConfig(vocab_size=50, rope_parameters={"rope_theta": 123.0}).save_pretrained(tmp_path)
    plain: Any = PlainConfig.from_pretrained(tmp_path)
    assert (plain.vocab_size, plain.rope_parameters["rope_theta"]) == (50, 123.0)


def test_our_config_reads_transformers_own(tmp_path):
    PlainConfig(hidden_act="silu").save_pretrained(tmp_path)
    assert BitNetConfig.from_pretrained(tmp_path).hidden_act == "silu"
    # As before version 5, and with fields left to transformers' defaults.
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bitnet", "rope_theta": 9e4, "vocab_size": 9}))
    config = ThriftyConfig.from_pretrained(tmp_path)
    assert config.rope_parameters is not None
    assert (config.rope_parameters["rope_theta"], config.num_hidden_layers, config.vocab_size) == (9e4, 30, 9)


def test_another_family_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ThriftyError, match="reads model_type thrifty, bitnet, doge, cheems, matmulfree; got 'llama'"):
        BitNetConfig.from_pretrained(tmp_path)


def test_bitnet_has_transformers_defaults():
    ours, theirs = BitNetConfig(), PlainConfig()
    for name in (
        "hidden_size",
        "intermediate_size",
        "num_key_value_heads",
        "hidden_act",
        "rope_parameters",
        "vocab_size",
    ):
        assert getattr(ours, name) == getattr(theirs, name)
