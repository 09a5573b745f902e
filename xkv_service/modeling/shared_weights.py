"""`sharing_weights`: a second model object over the same weights, so that each of two threads has its own."""

from __future__ import annotations

import copy
from dataclasses import replace

from xkv_service.decoding.xkv_attention import is_enabled
from xkv_service.errors import CacheMisuse
from xkv_service.modeling.models import LoadedModel


def sharing_weights(loaded: LoadedModel) -> LoadedModel:
    """The same model with modules and config of its own, and the parameters and buffers of `loaded`.

    A prefill changes a model's attention while it runs, and so does decoding from factors: each waits for
    the other on one object. Nobody may train either of the two.

    Raises:
        CacheMisuse: the model is inside `enable_xkv`, whose hooks would be copied too.
    """
    model = loaded.model
    if is_enabled(model):
        raise CacheMisuse("the model is in use already", hint="share its weights before an engine runs it")
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return replace(loaded, model=copy.deepcopy(model, shared))
