"""The one decoder: a layer is a token mixer and a feed-forward, each chosen by the config."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, Cache, DynamicCache, GenerationMixin
from transformers import initialization as init
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from thrifty.errors import ThriftyError
from thrifty.models.checkpoints import CheckpointedModel
from thrifty.models.configuration import ThriftyConfig
from thrifty.nn import BitAttention, BitFeedForward, BitLinear, RMSNorm, RotaryEmbedding


def _attention(config: ThriftyConfig, layer_idx: int) -> BitAttention:
    return BitAttention(
        config.hidden_size,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
        bias=config.attention_bias,
        dropout=config.attention_dropout,
        sub_norm=config.norm_placement == "sub_ln",
        weight=config.linear,  # pyright: ignore[reportArgumentType]
        norm=None,
        eps=config.rms_norm_eps,
        layer_idx=layer_idx,
    )


def _feed_forward(config: ThriftyConfig) -> BitFeedForward:
    return BitFeedForward(
        config.hidden_size,
        hidden=config.intermediate_size,
        glu=config.feed_forward == "glu",
        activation=config.hidden_act,
        post_act_norm=config.norm_placement == "sub_ln",
        bias=False,
        weight=config.linear,  # pyright: ignore[reportArgumentType]
        norm=None,
        eps=config.rms_norm_eps,
    )


#: Builders by the names in `ThriftyConfig.token_mixers`; a mixer is called as `BitAttention` is.
MIXERS: dict[str, Callable[[ThriftyConfig, int], nn.Module]] = {"attention": _attention}
#: Builders by the names of `ThriftyConfig.feed_forward`.
FEED_FORWARDS: dict[str, Callable[[ThriftyConfig], nn.Module]] = {"glu": _feed_forward, "mlp": _feed_forward}


class DecoderLayer(GradientCheckpointingLayer):
    """h = x + mixer(norm(x)); y = h + feed_forward(norm(h)), with transformers' parameter names."""

    def __init__(self, config: ThriftyConfig, layer_idx: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = MIXERS[config.mixer(layer_idx)](config, layer_idx)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = FEED_FORWARDS[config.feed_forward](config)

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor | None = None,
        past_key_values: Cache | None = None,
    ) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotary, mask, past_key_values)
        return x + self.mlp(self.post_attention_layernorm(x))


@cache
def _compiled_layer() -> Callable:
    """The forward of a layer, compiled at its first call. It is none of a model's state, which can be copied."""
    compiled = torch.compile(DecoderLayer.forward, dynamic=False)

    def forward(*args: Any) -> Tensor:
        with torch._dynamo.config.patch(suppress_errors=True):  # pyright: ignore[reportAttributeAccessIssue]
            return compiled(*args)

    return forward


class ThriftyPreTrainedModel(CheckpointedModel):
    """What every model on this decoder shares: initialisation, loading and saving."""

    config: ThriftyConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True

    def _init_weights(self, module: nn.Module) -> None:
        # transformers' initialisers leave alone what came from a checkpoint.
        if isinstance(module, BitLinear):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, RotaryEmbedding):
            for name, table in module.tables().items():
                init.copy_(getattr(module, name), table)
        else:
            super()._init_weights(module)


class ThriftyModel(ThriftyPreTrainedModel):
    """Embedding, layers, final norm: token ids [B, T] to hidden states [B, T, hidden_size]."""

    def __init__(self, config: ThriftyConfig, *, stored: bool = False) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        theta = (config.rope_parameters or {})["rope_theta"]
        self.rotary_emb = RotaryEmbedding(int(config.head_dim or 0), config.max_position_embeddings, theta)
        self.gradient_checkpointing = False
        self._compiled = False
        self.finish(stored)

    def compile_layers(self) -> None:
        """Fuse the layers' training step with `torch.compile`; evaluation and generation stay as they are.

        One compilation serves all layers, for they differ in their weights only. It needs a C++ compiler on CPUs, and
        takes some twenty seconds at the first step and at each new shape of a batch; where it fails, torch says so and
        goes on without. Layers whose activations are recomputed (gradient checkpointing) are not compiled.
        """
        self._compiled = True

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **_: Any,
    ) -> BaseModelOutputWithPast | tuple:
        """Hidden states of token ids [B, T], or of embeddings [B, T, hidden_size].

        attention_mask: [B, S], 0 at padding, S counting cached tokens too; or a [B, 1, T, S] mask taken as it is.
        position_ids: [B, T]; by default tokens are counted from each row's first one that is not padding.
        Raises ThriftyError for both or neither of ids and embeddings, and beyond `max_position_embeddings`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ThriftyError("[model] takes either input_ids or inputs_embeds; got both or neither")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=x,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        if position_ids is None:
            position_ids = self._positions(x, attention_mask, past_key_values)
        rotary = self.rotary_emb(position_ids)
        states = [x]
        compiled = self._compiled and self.training and torch.is_grad_enabled()
        recomputed = any(layer.gradient_checkpointing for layer in self.layers)
        run = _compiled_layer() if compiled and not recomputed else DecoderLayer.__call__
        for layer in self.layers:
            x = run(layer, x, rotary, mask, past_key_values)
            states.append(x)
        x = self.norm(x)
        output = BaseModelOutputWithPast(
            last_hidden_state=x,  # pyright: ignore[reportArgumentType]
            past_key_values=past_key_values,
            hidden_states=(*states[:-1], x) if self._option("output_hidden_states", output_hidden_states) else None,
        )
        return output if self._option("return_dict", return_dict) else output.to_tuple()

    def _positions(self, x: Tensor, attention_mask: Tensor | None, past_key_values: Cache | None) -> Tensor:
        seen = 0 if past_key_values is None else past_key_values.get_seq_length()
        total = seen + x.shape[1]
        if total > self.config.max_position_embeddings:
            raise ThriftyError(
                f"[model] the text must fit max_position_embeddings = {self.config.max_position_embeddings}; "
                f"got {total} tokens; shorten it or use a model made for longer ones"
            )
        if attention_mask is not None and attention_mask.ndim == 2 and attention_mask.shape[1] == total:
            return (attention_mask.long().cumsum(1) - 1).clamp(min=0)[:, -x.shape[1] :]
        return torch.arange(total - x.shape[1], total, device=x.device)[None]

    def _option(self, name: str, given: bool | None) -> bool:
        return getattr(self.config, name) if given is None else given


class ThriftyForCausalLM(ThriftyPreTrainedModel, GenerationMixin):
    """The decoder with an output head: token ids [B, T] to float32 logits [B, T, vocab_size].

    `from_pretrained` reads latent folders (trainable) and packed ones (`PackedBitLinear` layers; unpack=True makes them
    trainable). `save_pretrained` writes what the model holds.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: ThriftyConfig, *, stored: bool = False) -> None:
        super().__init__(config)
        self.model = ThriftyModel(config, stored=stored)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.finish(stored)

    def compile_layers(self) -> None:
        """`ThriftyModel.compile_layers`."""
        self.model.compile_layers()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """Logits, and with labels [B, T] (-100 is ignored) the mean cross-entropy of each next token, in nats.

        logits_to_keep: only the last so many positions (0: all), or those of an index. Other arguments: `ThriftyModel`.
        """
        hidden = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden.last_hidden_state[:, kept]).float()
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,  # pyright: ignore[reportArgumentType]
            past_key_values=hidden.past_key_values,
            hidden_states=hidden.hidden_states,
        )
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()


AutoConfig.register("thrifty", ThriftyConfig, exist_ok=True)
AutoModel.register(ThriftyConfig, ThriftyModel, exist_ok=True)
AutoModelForCausalLM.register(ThriftyConfig, ThriftyForCausalLM, exist_ok=True)
