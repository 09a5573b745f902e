"""What a model caches and how it rotates keys, found by looking at its cache and calling it once."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer

from xkv_artifacts.errors import first_line
from xkv_artifacts.manifest import StateLayout
from xkv_service.errors import UnsupportedModel
from xkv_service.modeling.cache_probe import CacheProbe, looks_ahead, probe_cache
from xkv_service.modeling.continuation import refuse_broken_continuation
from xkv_service.modeling.layout import LayerKind, LayerLayout, ModelLayout
from xkv_service.modeling.linear_state import state_layout
from xkv_service.modeling.rotary_probe import RotaryForm, no_rotation, probe_rotary_form

_KINDS: dict[type, LayerKind] = {
    DynamicLayer: "full",
    DynamicSlidingWindowLayer: "sliding",
    LinearAttentionLayer: "linear",
}
_NO_REASON = "cannot be compressed"
_REASONS = {
    "DynamicIndexedLayer": "selects tokens with an indexer of its own (sparse attention)",
    "LinearAttentionAndFullAttentionLayer": "mixes linear and full attention",
    "LinearAttentionAndSlidingWindowAttentionLayer": "mixes linear and sliding-window attention",
}


@dataclass(frozen=True, eq=False)
class InspectedModel:
    """A model's layout, and per compressible layer its attention module and rotary form.

    Latents (MLA) do not turn: their layers have the form without planes. `windowed` are the attention modules
    of the sliding layers.
    """

    layout: ModelLayout
    modules: dict[int, nn.Module]
    forms: dict[int, RotaryForm]
    windowed: dict[int, nn.Module]


def inspect_model(model: PreTrainedModel) -> ModelLayout:
    """The layout of the model's cache; for a model on the meta device, without a look at its rotary form.

    Raises:
        UnsupportedModel: its cache cannot be compressed; the message gives the reason.
    """
    if model.device.type == "meta":
        return _layout_without_weights(model)
    return inspect_loaded(model).layout


_INSPECTED: WeakKeyDictionary[PreTrainedModel, InspectedModel] = WeakKeyDictionary()


def inspect_loaded(model: PreTrainedModel) -> InspectedModel:
    """Everything a prefill needs to know about a loaded model; found once per model object.

    Raises:
        UnsupportedModel: as `inspect_model`.
    """
    if model not in _INSPECTED:
        _INSPECTED[model] = _inspect(model)
    return _INSPECTED[model]


def _inspect(model: PreTrainedModel) -> InspectedModel:
    kinds = cache_layer_kinds(model)
    probe = _probe(model)
    layout = _layout_from_probe(model, kinds, probe)
    ahead = looks_ahead(probe, _probe(model, last_token=5))
    if ahead is not None:
        raise UnsupportedModel(
            f"{_name(model)}: layer {ahead} attends to later tokens, so a prefix cannot be cached",
            hint="use a causal (decoder-only) language model",
        )
    if layout.states:
        refuse_broken_continuation(model)
    modules = {layer.index: probe.modules[layer.index] for layer in layout.compressible}
    forms = {
        layer.index: no_rotation()
        if layer.kind == "latent"
        else probe_rotary_form(modules[layer.index], probe.arguments[id(modules[layer.index])])
        for layer in layout.compressible
    }
    windowed = {layer.index: probe.modules[layer.index] for layer in layout.layers if layer.kind == "sliding"}
    return InspectedModel(layout, modules, forms, windowed)


def _probe(model: PreTrainedModel, *, last_token: int = 0) -> CacheProbe:
    try:
        return probe_cache(model, last_token=last_token)
    except ValueError as error:  # a cache class of its own (minimax)
        raise UnsupportedModel(
            f"{_name(model)} does not run with Transformers' ordinary cache: {first_line(error)}",
            hint="use another model",
        ) from error


def cache_layer_kinds(model: PreTrainedModel) -> dict[int, LayerKind]:
    """Kind of each caching layer, by the cache Transformers would make for the model.

    Raises:
        UnsupportedModel: a layer this project cannot keep, or none that it can compress.
    """
    _refuse_by_config(model)
    kinds: dict[int, LayerKind] = {}
    types = getattr(model.config.get_text_config(decoder=True), "layer_types", None) or ()
    for index, layer in enumerate(DynamicCache(config=model.config).layers):
        if type(layer).__name__ == "DummyLayer" or tuple(types[index : index + 1]) in (("moe",), ("mlp",)):
            continue
        if type(layer) not in _KINDS:
            name = type(layer).__name__
            raise UnsupportedModel(
                f"{_name(model)}: layer {index} keeps a {name}, which {_REASONS.get(name, _NO_REASON)}",
                hint="supported are layers of full, latent, sliding-window or linear attention",
            )
        kinds[index] = _KINDS[type(layer)]
    if "full" not in kinds.values():
        raise UnsupportedModel(
            f"{_name(model)} has no full-attention layer: its cache does not grow with the prefix",
            hint="there is nothing to compress; use the model without this service",
        )
    return kinds


def _refuse_by_config(model: PreTrainedModel) -> None:
    config = model.config.get_text_config(decoder=True)
    reason = None
    if getattr(model.config, "is_encoder_decoder", False):
        reason = "is an encoder-decoder model; only decoder-only models have a prefix cache"
    elif not model._can_set_attn_implementation():
        reason = "does not use Transformers' attention interface"
    elif getattr(config, "num_kv_shared_layers", 0):
        reason = "shares keys and values between layers, which is not supported"
    if reason is not None:
        raise UnsupportedModel(f"{_name(model)} {reason}", hint="use another model")


def _name(model: PreTrainedModel) -> str:
    return type(model).__name__


def _layout_from_probe(model: PreTrainedModel, kinds: dict[int, LayerKind], probe: CacheProbe) -> ModelLayout:
    sharing = sorted(set(probe.query_heads) - set(kinds))
    if sharing:
        raise UnsupportedModel(f"{_name(model)}: layer {sharing[0]} reads another layer's keys and values")
    return ModelLayout(tuple(_layer(model, index, kind, probe) for index, kind in kinds.items()))


def _layer(model: PreTrainedModel, index: int, kind: LayerKind, probe: CacheProbe) -> LayerLayout:
    """One layer by what it cached in a probe."""
    kept = probe.cache.layers[index]
    if kind == "linear":
        return _linear_layer(index, state_layout(index, kept, _name(model)))
    if kept.keys is None or index not in probe.query_heads or index not in probe.modules:
        raise UnsupportedModel(
            f"{_name(model)}: layer {index} does not use Transformers' attention interface"
        )
    if kind == "full" and _is_latent(model, probe.modules[index]):
        kind = "latent"
    return LayerLayout(
        index=index,
        kind=kind,
        kv_heads=kept.keys.shape[1],
        query_heads=probe.query_heads[index],
        head_dim=kept.keys.shape[-1],
        value_dim=kept.values.shape[-1],
        window=_window(kept, kind),
    )


def _linear_layer(index: int, state: StateLayout) -> LayerLayout:
    return LayerLayout(index, "linear", kv_heads=0, query_heads=0, head_dim=0, value_dim=0, state=state)


def _is_latent(model: PreTrainedModel, module: nn.Module) -> bool:
    """Whether an attention module caches latents, which its `expand_kv` makes keys and values of.

    Raises:
        UnsupportedModel: latent attention that caches what its latents expand to.
    """
    if hasattr(module, "expand_kv"):
        return True
    if getattr(model.config.get_text_config(decoder=True), "kv_lora_rank", None):
        raise UnsupportedModel(
            f"{_name(model)} uses latent attention (MLA) but does not cache its latents",
            hint="use a newer Transformers, whose cache holds the latents",
        )
    return False


def _window(layer: Any, kind: LayerKind) -> int | None:
    """Tokens a sliding layer keeps between calls: one less than a query sees, itself included."""
    return int(layer.sliding_window) - 1 if kind == "sliding" else None


def _layout_without_weights(model: PreTrainedModel) -> ModelLayout:
    """The layout of a model on the meta device: by a forward of shapes, else by the config's fields."""
    kinds = cache_layer_kinds(model)
    with suppress(AttributeError, ValueError):  # shapes of experts are known only where none is chosen
        model.set_experts_implementation("batched_mm")
    try:
        return _layout_from_probe(model, kinds, _probe(model))
    except RuntimeError:  # code that looks at values (routing of experts, say)
        return _layout_from_config(model, kinds)


def _layout_from_config(model: PreTrainedModel, kinds: dict[int, LayerKind]) -> ModelLayout:
    kept = DynamicCache(config=model.config).layers
    if "linear" in kinds.values():
        raise UnsupportedModel(
            f"{_name(model)}: the states of its linear-attention layers are not known without its weights",
            hint="use compress() with the loaded model",
        )
    config = model.config.get_text_config(decoder=True)
    fields = _latent_fields(config) if getattr(config, "kv_lora_rank", None) else _attention_fields(config)
    layers = []
    for index, kind in kinds.items():
        if kind == "full" and getattr(config, "kv_lora_rank", None):
            kind = "latent"
        layers.append(LayerLayout(index=index, kind=kind, window=_window(kept[index], kind), **fields))
    return ModelLayout(tuple(layers))


def _attention_fields(config: Any) -> dict[str, Any]:
    heads = int(config.num_attention_heads)
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    return {
        "kv_heads": int(getattr(config, "num_key_value_heads", None) or heads),
        "query_heads": heads,
        "head_dim": head_dim,
        "value_dim": head_dim,
    }


def _latent_fields(config: Any) -> dict[str, Any]:
    return {
        "kv_heads": 1,
        "query_heads": int(config.num_attention_heads),
        "head_dim": int(config.kv_lora_rank),
        "value_dim": int(config.qk_rope_head_dim),
    }
