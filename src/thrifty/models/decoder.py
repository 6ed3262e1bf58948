"""The one decoder: a layer is a token mixer and a feed-forward, each chosen by the config."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, Cache, GenerationMixin
from transformers import initialization as init
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast

from thrifty.errors import ThriftyError
from thrifty.models.blocks import FEED_FORWARDS, MIXERS
from thrifty.models.caches import Generation, fitting_cache
from thrifty.models.checkpoints import CheckpointedModel
from thrifty.models.choices import rope_scaling
from thrifty.models.configuration import ThriftyConfig
from thrifty.nn import SSD, BitLinear, CDMoE, DynamicMaskAttention, RMSNorm, RotaryEmbedding
from thrifty.nn.experts import load_balance_loss


class DecoderLayer(GradientCheckpointingLayer):
    """h = a * x + mixer(norm(x)); y = b * h + feed_forward(norm(h)), with transformers' parameter names.

    a = b = 1, or learned, one factor a channel, where config.residual is "scaled" (Doge).
    """

    def __init__(self, config: ThriftyConfig, layer_idx: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = MIXERS[config.mixer(layer_idx)](config, layer_idx)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = FEED_FORWARDS[config.feed_forward](config)
        if config.linear_norm_eps is not None:
            for module in [module for module in self.modules() if isinstance(module, BitLinear)]:
                module.rms_norm = RMSNorm(module.in_features, config.linear_norm_eps)
        self.dropout = config.hidden_dropout
        scaled = config.residual == "scaled"
        self.input_residual = nn.Parameter(torch.ones(config.hidden_size)) if scaled else None
        self.post_attention_residual = nn.Parameter(torch.ones(config.hidden_size)) if scaled else None

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor] | None = None,
        mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        output_router_logits: bool = False,
    ) -> Any:
        mixed = self.self_attn(self.input_layernorm(x), rotary, mask, past_key_values)
        x = self._add(x, mixed, self.input_residual)
        fed = self.post_attention_layernorm(x)
        if not output_router_logits:
            return self._add(x, self.mlp(fed), self.post_attention_residual)
        y, router_logits = self.mlp(fed, output_router_logits=True)
        return self._add(x, y, self.post_attention_residual), router_logits

    def _add(self, x: Tensor, y: Tensor, scale: Tensor | None) -> Tensor:
        if self.dropout and self.training:
            y = F.dropout(y, self.dropout)
        return x + y if scale is None else scale * x + y


@cache
def _compiled_layer() -> Callable:
    """The forward of a layer, compiled at its first call. It is none of a model's state, which can be copied."""
    compiled = torch.compile(DecoderLayer.forward, dynamic=False)

    def forward(*args: Any) -> Tensor:
        with torch._dynamo.config.patch(suppress_errors=True, skip_nnmodule_hook_guards=False):  # pyright: ignore[reportAttributeAccessIssue]
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
        elif isinstance(module, DecoderLayer):
            for scale in (module.input_residual, module.post_attention_residual):
                if scale is not None:
                    init.ones_(scale)
        elif isinstance(module, (SSD, DynamicMaskAttention)):
            for name, value in module.initial().items():
                init.copy_(getattr(module, name), value)
        elif isinstance(module, CDMoE) and module.router == "product_key_heads":
            init.normal_(module.keys, std=module.keys.shape[-1] ** -0.5)
        else:
            super()._init_weights(module)


class ThriftyModel(ThriftyPreTrainedModel):
    """Embedding, layers, final norm: token ids [B, T] to hidden states [B, T, hidden_size]."""

    def __init__(self, config: ThriftyConfig, *, stored: bool = False) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = None
        if config.has_positions:
            theta = (config.rope_parameters or {})["rope_theta"]
            sizes = int(config.head_dim or 0), config.max_position_embeddings
            self.rotary_emb = RotaryEmbedding(*sizes, theta, rope_scaling(config))
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
        output_router_logits: bool | None = None,
        return_dict: bool | None = None,
        **_: Any,
    ) -> MoeModelOutputWithPast | tuple:
        """Hidden states of token ids [B, T], or of embeddings [B, T, hidden_size].

        attention_mask: [B, S], 0 at padding, S counting cached tokens too; or a [B, 1, T, S] mask taken as it is.
        position_ids: [B, T]; by default tokens are counted from each row's first one that is not padding. Without an
        attention_mask, and without a cache, ids that restart divide a row into documents: none sees another.
        Raises ThriftyError for both or neither of ids and embeddings, beyond `max_position_embeddings`, and for
        documents with a cache.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ThriftyError("[model] takes either input_ids or inputs_embeds; got both or neither")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        documents = packed_documents(position_ids, len(x)) if attention_mask is None else None
        if documents is not None and (use_cache or past_key_values is not None):
            raise ThriftyError(
                "[model] documents packed in one row cannot be cached; got position_ids that restart, and a cache; "
                "pass use_cache=False, or give each document a row"
            )
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and documents is None
        past_key_values = fitting_cache(self.config, past_key_values, use_cache)
        masks = self._masks(x, attention_mask, past_key_values, documents)
        rotary = None
        if self.rotary_emb is not None:
            position_ids = self._positions(x, attention_mask, position_ids, past_key_values)
            rotary = self.rotary_emb(position_ids)
        states, router_logits = [x], []
        routed = self.config.feed_forward == "cdmoe" and self._option("output_router_logits", output_router_logits)
        compiled = self._compiled and self.training and torch.is_grad_enabled()
        recomputed = any(layer.gradient_checkpointing for layer in self.layers)
        run = _compiled_layer() if compiled and not recomputed else DecoderLayer.__call__
        for i, layer in enumerate(self.layers):
            mixer = self.config.mixer(i)
            positions = rotary if self.config.reads_positions(mixer) else None
            x = run(layer, x, positions, masks[mixer], past_key_values, routed)
            if routed:
                x, scores = x
                router_logits.append(scores)
            states.append(x)
        x = self.norm(x)
        output = MoeModelOutputWithPast(
            last_hidden_state=x,  # pyright: ignore[reportArgumentType]
            past_key_values=past_key_values,
            hidden_states=(*states[:-1], x) if self._option("output_hidden_states", output_hidden_states) else None,
            router_logits=tuple(router_logits) if routed else None,  # pyright: ignore[reportArgumentType]
        )
        return output if self._option("return_dict", return_dict) else output.to_tuple()

    def _masks(
        self, x: Tensor, attention_mask: Tensor | None, past_key_values: Cache | None, documents: Tensor | None
    ) -> dict[str, Tensor | None]:
        """What each mixer is given: the documents of tokens where a row has several; else attention a mask of queries
        and keys, and the others which tokens are no padding."""
        mixers, masks = self.config.mixers, {}
        if documents is not None:
            return dict.fromkeys(mixers, documents)
        if "attention" in mixers:
            masks["attention"] = create_causal_mask(
                config=self.config,
                inputs_embeds=x,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
            )
        if mixers - {"attention"}:
            if attention_mask is not None and attention_mask.ndim != 2:
                raise ThriftyError(
                    f"[model] {', '.join(sorted(mixers - {'attention'}))} read a mask of padding [B, S]; got "
                    f"{attention_mask.ndim} dimensions; give 1 at tokens and 0 at padding"
                )
            padded = attention_mask is not None and not bool(attention_mask.all())
            kept = attention_mask.bool() if padded and attention_mask is not None else None
            masks |= dict.fromkeys(mixers - {"attention"}, kept)
        return masks

    def _positions(
        self, x: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, past_key_values: Cache | None
    ) -> Tensor:
        """position_ids where they are given, else what the mask counts."""
        seen = 0 if past_key_values is None else past_key_values.get_seq_length()
        total = seen + x.shape[1]
        most = self.config.max_position_embeddings
        # Padding takes no position, so a longer row may fit.
        if total > most and (position_ids is None or int(position_ids.max()) >= most):
            raise ThriftyError(
                f"[model] the text must fit max_position_embeddings = {most}; "
                f"got {total} tokens; shorten it or use a model made for longer ones"
            )
        if position_ids is not None:
            return position_ids
        if attention_mask is not None and attention_mask.ndim == 2 and attention_mask.shape[1] == total:
            return (attention_mask.long().cumsum(1) - 1).clamp(min=0)[:, -x.shape[1] :]
        return torch.arange(total - x.shape[1], total, device=x.device)[None]

    def _option(self, name: str, given: bool | None) -> bool:
        return getattr(self.config, name) if given is None else given


def packed_documents(position_ids: Tensor | None, rows: int) -> Tensor | None:
    """The document of each token, int64 [B, T], where position_ids [B or 1, T] do not go on by ones; None where all do.

    That is how transformers marks documents packed in a row. While a compiler traces the whole model the numbers are
    returned in either case, as nothing can be decided by them.
    """
    if position_ids is None:
        return None
    documents = (torch.diff(position_ids, prepend=position_ids[:, :1] - 1) != 1).cumsum(1).expand(rows, -1)
    if torch.compiler.is_compiling() or bool(documents[:, -1].any()):
        return documents
    return None


class ThriftyForCausalLM(ThriftyPreTrainedModel, Generation, GenerationMixin):
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
        output_router_logits: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast | tuple:
        """Logits, and with labels [B, T] (-100 is ignored) the mean cross-entropy of each next token, in nats.

        logits_to_keep: only the last so many positions (0: all), or those of an index. output_router_logits: with the
        load-balance loss of the experts, added router_aux_loss_coef times. Other arguments: `ThriftyModel`.
        """
        hidden = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_router_logits=output_router_logits,
            return_dict=True,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden.last_hidden_state[:, kept]).float()
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        aux_loss = None
        if hidden.router_logits is not None:
            # Of the tokens given now: a mask counts those in the cache too.
            mask = None
            if attention_mask is not None and attention_mask.ndim == 2:
                mask = attention_mask[:, -hidden.last_hidden_state.shape[1] :]
            aux_loss = load_balance_loss(hidden.router_logits, self.config.num_experts_per_tok, mask)
            if loss is not None:
                # Of a batch that is computed in parts, each adds its share.
                items = kwargs.get("num_items_in_batch")
                share = 1 if items is None or labels is None else labels[..., 1:].ne(-100).sum() / items
                loss = loss + self.config.router_aux_loss_coef * share * aux_loss
        output = MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,  # pyright: ignore[reportArgumentType]
            logits=logits,  # pyright: ignore[reportArgumentType]
            past_key_values=hidden.past_key_values,
            hidden_states=hidden.hidden_states,
            router_logits=hidden.router_logits,
        )
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()


AutoConfig.register("thrifty", ThriftyConfig, exist_ok=True)
AutoModel.register(ThriftyConfig, ThriftyModel, exist_ok=True)
AutoModelForCausalLM.register(ThriftyConfig, ThriftyForCausalLM, exist_ok=True)
