"""What a layer of the decoder is made of: builders by the names that the config has for them."""

from collections.abc import Callable
from typing import Any

from torch import nn

from thrifty.models.configuration import ThriftyConfig
from thrifty.nn import MLGRU, SSD, BitAttention, BitFeedForward, CDMoE, DynamicMaskAttention


def _mixer(config: ThriftyConfig, layer_idx: int) -> dict[str, Any]:
    """What every mixer is told."""
    return {
        "bias": config.attention_bias,
        "sub_norm": config.norm_placement == "sub_ln",
        "weight": config.linear,
        "norm": None,
        "eps": config.rms_norm_eps,
        "layer_idx": layer_idx,
    }


def _attention(config: ThriftyConfig, layer_idx: int) -> nn.Module:
    return BitAttention(
        config.hidden_size,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
        out_bias=config.attention_bias and config.attention_out_bias,
        qk_norm=config.attention_qk_norm,
        dropout=config.attention_dropout,
        **_mixer(config, layer_idx),
    )


def _dynamic_mask(config: ThriftyConfig, layer_idx: int) -> nn.Module:
    return DynamicMaskAttention(
        config.hidden_size,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
        window=config.keep_window_size,
        selection=config.dynamic_mask_selection,  # pyright: ignore[reportArgumentType]
        ratio=config.dynamic_mask_ratio,
        max_positions=config.max_position_embeddings,
        dt_heads=config.dt_heads,  # pyright: ignore[reportArgumentType]
        qk_norm=config.qk_norm,
        dropout=config.attention_dropout,
        # The legacy router reads what stands at padding.
        keyless_mean=config.feed_forward == "cdmoe" and config.router_layout == "legacy",
        **_mixer(config, layer_idx),
    )


def _mlgru(config: ThriftyConfig, layer_idx: int) -> nn.Module:
    return MLGRU(config.hidden_size, **_mixer(config, layer_idx))


def _ssd(config: ThriftyConfig, layer_idx: int) -> nn.Module:
    # As in Cheems: a group for each head, a state as wide as a head, nothing on the skip path.
    return SSD(
        config.hidden_size,
        config.num_attention_heads,
        d_state=config.head_dim,
        chunk_len=config.ssd_chunk_size,
        head_dim=config.head_dim,
        skip=False,
        **_mixer(config, layer_idx),
    )


def _feed_forward(config: ThriftyConfig) -> nn.Module:
    return BitFeedForward(
        config.hidden_size,
        hidden=config.intermediate_size,
        glu=config.feed_forward == "glu",
        activation=config.hidden_act,
        post_act_norm=config.norm_placement == "sub_ln",
        bias=config.mlp_bias,
        weight=config.linear,  # pyright: ignore[reportArgumentType]
        norm=None,
        eps=config.rms_norm_eps,
    )


def _experts(config: ThriftyConfig) -> nn.Module:
    return CDMoE(
        config.hidden_size,
        config.hidden_act,
        config.intermediate_size,
        config.expert_retrieval_size,
        config.num_experts,
        config.num_experts_heads,
        config.num_experts_per_tok,
        router=config.router,  # pyright: ignore[reportArgumentType]
        router_layout=config.router_layout,  # pyright: ignore[reportArgumentType]
        norm_topk_prob=config.norm_topk_prob,
        bias=config.mlp_bias,
        weight=config.linear,  # pyright: ignore[reportArgumentType]
        norm=None,
    )


#: Builders by the names in `ThriftyConfig.token_mixers`; a mixer is called as `BitAttention` is.
MIXERS: dict[str, Callable[[ThriftyConfig, int], nn.Module]] = {
    "attention": _attention,
    "dynamic_mask": _dynamic_mask,
    "mlgru": _mlgru,
    "ssd": _ssd,
}
#: Builders by the names of `ThriftyConfig.feed_forward`.
FEED_FORWARDS: dict[str, Callable[[ThriftyConfig], nn.Module]] = {
    "glu": _feed_forward,
    "mlp": _feed_forward,
    "cdmoe": _experts,
}
