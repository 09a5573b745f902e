"""What a model caches and how it rotates keys, found by looking at its cache and calling it once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from xkv_service.errors import UnsupportedModel
from xkv_service.layout import LayerKind, LayerLayout, ModelLayout
from xkv_service.observation import observe
from xkv_service.rotary_probe import RotaryForm, probe_rotary_form

_PROBE_TOKENS = 4


@dataclass(frozen=True, eq=False)
class InspectedModel:
    """A model's layout, and per full-attention layer its attention module and rotary form."""

    layout: ModelLayout
    modules: dict[int, nn.Module]
    forms: dict[int, RotaryForm]


def inspect_model(model: PreTrainedModel) -> ModelLayout:
    """The layout of the model's cache. A model on the meta device is read from its config alone.

    Raises:
        UnsupportedModel: its cache cannot be compressed; the message gives the reason.
    """
    if model.device.type == "meta":
        return _layout_from_config(model)
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
    probe = _Probe()
    cache = _ProbeCache(model.config, probe)
    ids = torch.arange(1, _PROBE_TOKENS + 1, device=model.device)[None] % _vocabulary(model)
    candidates = [module for module in model.modules() if isinstance(getattr(module, "layer_idx", None), int)]
    with torch.inference_mode(), observe(model, probe, candidates):
        model(input_ids=ids, past_key_values=cache, use_cache=True)
    _refuse_shared_cache(probe, kinds)
    layers = tuple(_layer_layout(cache, probe, index, kind) for index, kind in kinds.items())
    modules = {index: probe.modules[index] for index, kind in kinds.items() if kind == "full"}
    forms = {
        index: probe_rotary_form(module, probe.arguments[id(module)]) for index, module in modules.items()
    }
    element_bytes = cache.layers[layers[0].index].keys.element_size()
    return InspectedModel(ModelLayout(layers, element_bytes), modules, forms)


@dataclass
class _Probe:
    """Records, per layer, the query heads, the attention module that fills the cache, and its arguments."""

    query_heads: dict[int, int] = field(default_factory=dict)
    modules: dict[int, nn.Module] = field(default_factory=dict)
    arguments: dict[int, dict[str, Any]] = field(default_factory=dict)
    innermost: dict[int, nn.Module] = field(default_factory=dict)

    def on_query(self, module: nn.Module, query: torch.Tensor) -> None:
        self.query_heads[int(module.layer_idx)] = query.shape[1]  # type: ignore[arg-type]

    def on_attention_input(self, module: nn.Module, arguments: dict[str, Any]) -> None:
        self.innermost[int(module.layer_idx)] = module  # type: ignore[arg-type]
        self.arguments[id(module)] = arguments


class _ProbeCache(DynamicCache):  # type: ignore[misc]
    """Notes which module was the last entered when its layer's cache is filled: the attention module."""

    def __init__(self, config: Any, probe: _Probe) -> None:
        super().__init__(config=config)
        self._probe = probe

    def update(self, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        if layer_idx in self._probe.innermost:
            self._probe.modules[layer_idx] = self._probe.innermost[layer_idx]
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


def _layer_layout(cache: DynamicCache, probe: _Probe, index: int, kind: LayerKind) -> LayerLayout:
    layer = cache.layers[index]
    if layer.keys is None or index not in probe.query_heads or index not in probe.modules:
        raise UnsupportedModel(f"layer {index} does not use Transformers' attention interface")
    return LayerLayout(
        index=index,
        kind=kind,
        kv_heads=layer.keys.shape[1],
        query_heads=probe.query_heads[index],
        head_dim=layer.keys.shape[-1],
        value_dim=layer.values.shape[-1],
        window=_window(layer) if kind == "sliding" else None,
    )


def _refuse_shared_cache(probe: _Probe, kinds: dict[int, LayerKind]) -> None:
    sharing = sorted(set(probe.query_heads) - set(kinds))
    if sharing:
        raise UnsupportedModel(f"layer {sharing[0]} reads another layer's keys and values")


def _vocabulary(model: PreTrainedModel) -> int:
    return int(model.config.get_text_config(decoder=True).vocab_size)


def _window(layer: Any) -> int:
    """Tokens a sliding layer keeps between calls: one less than what a query sees, itself included."""
    return int(layer.sliding_window) - 1


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
            hint="nothing to compress; use the model without this service",
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
        raise UnsupportedModel(f"{_name(model)} {reason}")


def _name(model: PreTrainedModel) -> str:
    return type(model).__name__


def _layout_from_config(model: PreTrainedModel) -> ModelLayout:
    """The layout by config fields and weight shapes, for a model without weights."""
    config = model.config.get_text_config(decoder=True)
    kinds = cache_layer_kinds(model)
    layers = DynamicCache(config=model.config).layers
    heads = int(config.num_attention_heads)
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    return ModelLayout(
        tuple(
            LayerLayout(
                index=index,
                kind=kind,
                kv_heads=kv_heads,
                query_heads=heads,
                head_dim=head_dim,
                value_dim=head_dim,
                window=_window(layers[index]) if kind == "sliding" else None,
            )
            for index, kind in kinds.items()
        ),
        element_bytes=model.dtype.itemsize,
    )
