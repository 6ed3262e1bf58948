import json
from typing import Any

import pytest
from transformers import BitNetConfig as PlainConfig
from transformers import DogeConfig as PlainDoge

from thrifty.errors import ThriftyError
from thrifty.models import BitNetConfig, CheemsConfig, DogeConfig, MatMulFreeConfig, ThriftyConfig


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
        ({"token_mixers": ["ssd", "mlgru", "ssd"]}, "token_mixers must repeat to 8 layers; got 3 entries; make it as"),
        (
            {"token_mixers": "dynamic_mask", "keep_window_size": 0},
            "keep_window_size must be an integer of at least 1; got 0; .*none",
        ),
        (
            {"token_mixers": "dynamic_mask", "sliding_window": 64},
            "sliding_window must be None, as keys .*; got 64; set",
        ),
        ({"sliding_window": 64}, "sliding_window must be None"),
        ({"token_mixers": "dynamic_mask", "dynamic_mask_ratio": 2.0}, r"dynamic_mask_ratio must be in \(0, 1\]"),
        ({"dynamic_mask_selection": "best"}, "dynamic_mask_selection must be one of none, keep_window"),
        ({"dt_heads": "query"}, "dt_heads must be one of kv, attention"),
        ({"residual": "gated"}, "residual must be one of plain, scaled"),
        ({"feed_forward": "cdmoe", "num_experts": 16_348}, "num_experts must be the square.*got 16348; take 16129 or"),
        ({"feed_forward": "cdmoe", "num_experts": 16}, "num_experts_per_tok must be 1 to num_experts = 16; got 64"),
        ({"feed_forward": "cdmoe", "num_experts_heads": 2}, "num_experts_heads must be 1 with router 'linear'; got 2"),
        (
            {"feed_forward": "cdmoe", "router": "product_key_heads", "expert_retrieval_size": 7},
            "expert_retrieval_size must be even, a half for each key; got 7",
        ),
        (
            {"feed_forward": "cdmoe", "router": "product_key_heads", "router_layout": "legacy"},
            "router_layout 'legacy' is that of router 'linear'; got 'product_key_heads'; use 'per_token'",
        ),
        ({"ssd_chunk_size": 0}, "ssd_chunk_size must be a positive integer; got 0"),
        ({"vocab_size": 0}, "vocab_size must be a positive integer; got 0"),
        ({"hidden_size": "big"}, "hidden_size must be a positive integer; got 'big'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "rope_type must be 'default'"),
    ],
)
def test_what_cannot_be_is_refused(fields, message):
    with pytest.raises(ThriftyError, match=message):
        ThriftyConfig(**fields)


def test_cheems_has_a_pattern_of_its_own():
    first: dict[str, Any] = {"attn_layer_period": 2, "attn_layer_offset": 0}
    outside: dict[str, Any] = {"attn_layer_period": 2, "attn_layer_offset": 3}
    assert CheemsConfig().token_mixers == (["ssd"] * 7 + ["dynamic_mask"]) * 4
    assert CheemsConfig(num_hidden_layers=3).mixers == {"ssd"}
    assert CheemsConfig(**first, num_hidden_layers=2).mixer(0) == "dynamic_mask"
    with pytest.raises(ThriftyError, match="attn_layer_offset must be at least 0 and below attn_layer_period; got 3"):
        CheemsConfig(**outside)


def test_the_seeds_names_of_fields_are_read():
    old: dict[str, Any] = {"hidden_bias": True, "is_moe": True, "num_cdmoe_experts": 64, "num_cdmoe_heads": 2}
    old |= {"num_cdmoe_experts_per_head": 4, "dynamic_mask_ratio": 0.25}
    config = DogeConfig(**old, router="product_key_heads")
    assert (config.attention_bias, config.mlp_bias, config.feed_forward) == (True, True, "cdmoe")
    assert (config.num_experts, config.num_experts_heads, config.num_experts_per_tok) == (64, 2, 4)
    assert config.dynamic_mask_selection == "ratio"
    causal: dict[str, Any] = {"is_causal": True}
    assert DogeConfig(**causal).mixers == {"attention"}
    assert DogeConfig().to_dict()["model_type"] == "doge"


def test_doge_has_transformers_defaults():
    theirs = PlainDoge()
    for name, value in DogeConfig().to_dict().items():
        if name not in ("head_dim", "transformers_version", "is_moe") and hasattr(theirs, name):
            assert value == getattr(theirs, name), name


def test_saved_and_read_again(tmp_path):
    moe: dict[str, Any] = {"is_moe": True, "num_experts": 64}
    for config in (
        DogeConfig(),
        DogeConfig(**moe, router_layout="legacy"),
        DogeConfig(linear="ternary", num_experts=49, feed_forward="cdmoe", num_experts_per_tok=3),
        CheemsConfig(),
        MatMulFreeConfig(linear="dense"),
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
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(ThriftyError, match=r"reads model_type thrifty, .*, qwen3; got 'gpt2'"):
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
