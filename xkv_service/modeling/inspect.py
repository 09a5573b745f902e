"""What a model caches and how it rotates keys, found by looking at its cache and calling it once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from xkv_service.errors import UnsupportedModel
from xkv_service.modeling.cache_probe import CacheProbe, looks_ahead, probe_cache
from xkv_service.modeling.layout import LayerKind, LayerLayout, ModelLayout
from xkv_service.modeling.rotary_probe import RotaryForm, probe_rotary_form


@dataclass(frozen=True, eq=False)
class InspectedModel:
    """A model's layout, and per full-attention layer its attention module and rotary form."""

    layout: ModelLayout
    modules: dict[int, nn.Module]
    forms: dict[int, RotaryForm]


def inspect_model(model: PreTrainedModel) -> ModelLayout:
    """The layout of the model's cache; for a model on the meta device, without a look at its rotary form.

    Raises:
        UnsupportedModel: its cache cannot be compressed; the message gives the reason.
    """
    if model.device.type == "meta":
        return _layout_without_weights(model)
    return inspect_loaded(model).layout


def probe_rotary(model: PreTrainedModel) -> dict[int, RotaryForm]:
    """The rotary form of each full-attention layer of a loaded model.

    Raises:
        UnsupportedModel: as `inspect_model`.
    """
    return inspect_loaded(model).forms


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
    probe = probe_cache(model)
    layout = _layout_from_probe(model, kinds, probe)
    ahead = looks_ahead(probe, probe_cache(model, last_token=5))
    if ahead is not None:
        raise UnsupportedModel(
            f"{_name(model)}: layer {ahead} attends to later tokens, so a prefix cannot be cached",
            hint="use a causal (decoder-only) language model",
        )
    modules = {layer.index: probe.modules[layer.index] for layer in layout.compressible}
    forms = {
        index: probe_rotary_form(module, probe.arguments[id(module)]) for index, module in modules.items()
    }
    return InspectedModel(layout, modules, forms)


def cache_layer_kinds(model: PreTrainedModel) -> dict[int, LayerKind]:
    """Kind of each caching layer, by the cache Transformers would make for the model.

    Raises:
        UnsupportedModel: a layer this project cannot keep, or none that it can compress.
    """
    _refuse_by_config(model)
    kinds: dict[int, LayerKind] = {}
    for index, layer in enumerate(DynamicCache(config=model.config).layers):
        if type(layer) is DynamicLayer:
            kinds[index] = "full"
        elif type(layer) is DynamicSlidingWindowLayer:
            kinds[index] = "sliding"
        elif type(layer).__name__ != "DummyLayer":
            raise UnsupportedModel(
                f"{_name(model)}: layer {index} keeps a {type(layer).__name__}, which cannot be compressed",
                hint="supported are models of full-attention and sliding-window layers",
            )
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
    elif getattr(config, "kv_lora_rank", None):
        reason = "uses multi-head latent attention (MLA), which is not supported yet"
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
    layers = []
    for index, kind in kinds.items():
        kept = probe.cache.layers[index]
        if kept.keys is None or index not in probe.query_heads or index not in probe.modules:
            raise UnsupportedModel(
                f"{_name(model)}: layer {index} does not use Transformers' attention interface"
            )
        layers.append(
            LayerLayout(
                index=index,
                kind=kind,
                kv_heads=kept.keys.shape[1],
                query_heads=probe.query_heads[index],
                head_dim=kept.keys.shape[-1],
                value_dim=kept.values.shape[-1],
                window=_window(kept, kind),
            )
        )
    return ModelLayout(tuple(layers))


def _window(layer: Any, kind: LayerKind) -> int | None:
    """Tokens a sliding layer keeps between calls: one less than a query sees, itself included."""
    return int(layer.sliding_window) - 1 if kind == "sliding" else None


def _layout_without_weights(model: PreTrainedModel) -> ModelLayout:
    """The layout of a model on the meta device: by a forward of shapes, else by the config's fields."""
    kinds = cache_layer_kinds(model)
    try:
        return _layout_from_probe(model, kinds, probe_cache(model))
    except RuntimeError:  # code that looks at values (routing of experts, say)
        return _layout_from_config(model, kinds)


def _layout_from_config(model: PreTrainedModel, kinds: dict[int, LayerKind]) -> ModelLayout:
    config = model.config.get_text_config(decoder=True)
    kept = DynamicCache(config=model.config).layers
    heads = int(config.num_attention_heads)
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    layers = tuple(
        LayerLayout(
            index=index,
            kind=kind,
            kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
            query_heads=heads,
            head_dim=head_dim,
            value_dim=head_dim,
            window=_window(kept[index], kind),
        )
        for index, kind in kinds.items()
    )
    return ModelLayout(layers)
