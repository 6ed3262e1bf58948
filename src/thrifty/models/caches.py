"""Caches for generation: to each mixer the layer that holds what it needs of the past, and no more."""

from typing import Any

from transformers import Cache, DynamicCache, GenerationMixin, StaticCache
from transformers.cache_utils import DynamicLayer
from transformers.generation.configuration_utils import GenerationMode

from thrifty.errors import ThriftyError
from thrifty.models.configuration import ThriftyConfig
from thrifty.nn import DynamicMaskLayer, RecurrentLayer


def new_cache(config: ThriftyConfig) -> Cache:
    """An empty cache for the model of that config."""
    if not config.is_stateful:
        return DynamicCache(config=config)
    return Cache(layers=[LAYERS[config.mixer(i)]() for i in range(config.num_hidden_layers)])


def fitting_cache(config: ThriftyConfig, cache: Cache | None, wanted: bool) -> Cache | None:
    """The cache itself, or an empty one where none is given and one is wanted.

    An empty `DynamicCache` gets the layers of the model. Raises ThriftyError for a static one that cannot serve.
    """
    if cache is None:
        return new_cache(config) if wanted else None
    if config.is_stateful:
        if isinstance(cache, StaticCache):
            raise _refusal(config, "static caches")
        if isinstance(cache, DynamicCache) and cache.get_seq_length() == 0:
            cache.layers, cache.layer_class_to_replicate = new_cache(config).layers, None
    return cache


#: The layer of a cache that each mixer needs.
LAYERS: dict[str, type] = {
    "attention": DynamicLayer,
    "dynamic_mask": DynamicMaskLayer,
    "mlgru": RecurrentLayer,
    "ssd": RecurrentLayer,
}
# Its methods are annotated with a class that exists for type checkers only.
_mixin: Any = GenerationMixin


class Generation:
    """The part of `generate` that concerns caches."""

    config: ThriftyConfig

    def _validate_generation_mode(self: Any, generation_mode: Any, generation_config: Any, kwargs: Any) -> None:
        if self.config.is_stateful:
            if generation_mode == GenerationMode.ASSISTED_GENERATION:
                raise _refusal(self.config, "assisted generation")
            implementation = generation_config.cache_implementation
            if implementation not in (None, "dynamic"):
                raise _refusal(self.config, f"cache_implementation='{implementation}'")
        _mixin._validate_generation_mode(self, generation_mode, generation_config, kwargs)

    def _prepare_cache_for_generation(
        self: Any, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        if self.config.is_stateful and generation_config.use_cache and model_kwargs.get("past_key_values") is None:
            if generation_config.is_assistant:
                raise _refusal(self.config, "assisted generation")
            model_kwargs["past_key_values"] = new_cache(self.config)
            return None
        return _mixin._prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs)


def _refusal(config: ThriftyConfig, what: str) -> ThriftyError:
    mixers = ", ".join(sorted(config.mixers - {"attention"}))
    return ThriftyError(
        f"[generate] {what} cannot be had: the caches of {mixers} do not give tokens back; generate without"
    )
