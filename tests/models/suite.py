"""Small models for the tests: every choice of the config appears in one of them."""

from typing import Any

import torch

from thrifty.models import (
    CheemsConfig,
    CheemsForCausalLM,
    DogeConfig,
    DogeForCausalLM,
    MatMulFreeConfig,
    MatMulFreeForCausalLM,
    ThriftyConfig,
    ThriftyForCausalLM,
)

VOCAB = 97
SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS: dict[str, Any] = {"feed_forward": "cdmoe", "num_experts": 49, "num_experts_per_tok": 5}
#: Fields beside `SMALL`, by a name for the test's id.
MIXTURES: dict[str, dict[str, Any]] = {
    "bitnet": {"num_key_value_heads": 2},
    "bitnet-untied-relu2": {"tie_word_embeddings": False, "hidden_act": "relu2", "num_key_value_heads": 1},
    "ternary-mlp-pre": {"feed_forward": "mlp", "norm_placement": "pre", "hidden_act": "gelu"},
    "binary-glu-pre-bias": {"linear": "binary", "norm_placement": "pre", "attention_bias": True},
    "binary-mlp-odd": {"linear": "binary", "feed_forward": "mlp", "intermediate_size": 49, "head_dim": 10},
    "dense": {"linear": "dense", "num_key_value_heads": 2},
    "dense-mlp-pre": {"linear": "dense", "feed_forward": "mlp", "norm_placement": "pre"},
    "matmulfree": {"family": "matmulfree"},
    "doge": {"family": "doge", "num_key_value_heads": 2, "keep_window_size": 5},
    "doge-wide": {"family": "doge", "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "doge-ternary": {"family": "doge", "linear": "ternary", "norm_placement": "sub_ln", "keep_window_size": 4},
    "doge-old": {"family": "doge", "qk_norm": False, "dt_heads": "attention", "dynamic_mask_ratio": 0.1},
    "doge-seed": {
        "family": "doge",
        "qk_norm": False,
        "dt_heads": "attention",
        "dynamic_mask_selection": "none",
        "tie_word_embeddings": True,
    },
    "cheems-seed": {
        "family": "cheems",
        "token_mixers": ["ssd", "dynamic_mask"],
        "qk_norm": False,
        "dt_heads": "attention",
        "dynamic_mask_selection": "none",
    },
    "cheems": {"family": "cheems", "token_mixers": ["ssd", "dynamic_mask"], "keep_window_size": 5, "ssd_chunk_size": 4},
    "doge-moe": {"family": "doge", **_EXPERTS, "keep_window_size": 5},
    "doge-moe-ternary": {"family": "doge", **_EXPERTS, "linear": "ternary", "norm_placement": "sub_ln"},
    "doge-moe-seed": {
        "family": "doge",
        **_EXPERTS,
        "router": "product_key_heads",
        "num_experts_heads": 2,
        "expert_retrieval_size": 6,
        "qk_norm": False,
        "dt_heads": "attention",
        "dynamic_mask_selection": "none",
        "tie_word_embeddings": True,
    },
    "cheems-moe": {"family": "cheems", **_EXPERTS, "num_hidden_layers": 8, "ssd_chunk_size": 4},
    "all-four": {
        "token_mixers": ["attention", "dynamic_mask", "mlgru", "ssd"],
        "num_hidden_layers": 4,
        "keep_window_size": 4,
        "residual": "scaled",
    },
    "ternary-recurrent": {"token_mixers": ["ssd", "mlgru", "attention"], "num_hidden_layers": 3, "ssd_chunk_size": 5},
    "dense-recurrent-pre": {
        "token_mixers": ["mlgru", "ssd"],
        "linear": "dense",
        "norm_placement": "pre",
        "residual": "scaled",
        "ssd_rotary": False,
        "mlp_bias": True,
    },
}
_FAMILIES: dict[str, tuple[type[ThriftyConfig], type[ThriftyForCausalLM]]] = {
    "thrifty": (ThriftyConfig, ThriftyForCausalLM),
    "doge": (DogeConfig, DogeForCausalLM),
    "cheems": (CheemsConfig, CheemsForCausalLM),
    "matmulfree": (MatMulFreeConfig, MatMulFreeForCausalLM),
}
#: Those with weights to pack.
QUANTISED = [
    name
    for name, fields in MIXTURES.items()
    if fields.get("linear", _FAMILIES[fields.get("family", "thrifty")][0].linear) != "dense"
]


def small_model(mixture: str, seed: int = 0) -> ThriftyForCausalLM:
    """A random model in evaluation mode. Weights are large enough for its answers to differ."""
    torch.manual_seed(seed)
    fields = {**SMALL, **MIXTURES[mixture], "initializer_range": 0.3}
    make_config, make_model = _FAMILIES[fields.pop("family", "thrifty")]
    model = make_model(make_config(**fields))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("norm", "bias", "residual", ".A")):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def small_tokens(batch: int = 2, length: int = 12, seed: int = 0) -> torch.Tensor:
    """Token ids without special tokens."""
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def close_in_most(actual: torch.Tensor, expected: torch.Tensor, share: float = 0.9) -> None:
    """Logits [..., vocabulary] agree to 1e-4 of their range in at least this share of positions, and roughly in all.

    Where floats are summed in another order, an activation can fall on the other side of a rounding boundary. Its code
    then moves by one, a change of 1/127 of the token's largest activation, and it moves what follows: rare, and small.
    """
    span = (expected.max() - expected.min()).item()
    difference = (actual - expected).abs().amax(-1).flatten() / span
    agreeing = (difference < 1e-4).float().mean().item()
    if agreeing < share or difference.max().item() > 0.1:
        raise AssertionError(
            f"{agreeing:.0%} of positions agree; largest difference {difference.max():.1e} of the range"
        )
