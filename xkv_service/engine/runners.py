"""Run the next tokens of several sequences: in one forward where the model allows it, else one by one."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel

from xkv_service.decoding.cache import XKVCache
from xkv_service.decoding.kept_launches import KeptLaunches
from xkv_service.decoding.kernel_choice import kernels_run
from xkv_service.engine.packed_cache import PackedCache, Segment
from xkv_service.modeling.inspect import inspect_loaded
from xkv_service.modeling.joined_products import join_products
from xkv_service.modeling.rotary_source import frequency_change
from xkv_service.sessions.context import Context
from xkv_service.sessions.exact import empty_context

_log = logging.getLogger(__name__)
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.15, torch.float16: 0.05}
"""Of the largest logit, between packed and separate runs: rounding is far below, a mixed-up token above."""

Work = Sequence[tuple[Context, list[int]]]


class Runner(Protocol):
    """Runs new tokens of several contexts of one model, inside `enable_xkv`.

    Attributes:
        shared_bytes: on the device, of keys and values that it keeps for sequences on one prefix. May be read
            from any thread.
    """

    @property
    def shared_bytes(self) -> int:
        """See above."""

    def run(self, work: Work) -> torch.Tensor:
        """Run each context over its new ids (at least one).

        Returns:
            Logits behind the last of each: float32 [contexts, vocabulary].
        """

    def settle(self, context: Context) -> None:
        """Make a context whole that is not to run any more: until then it may lack what ran."""


class SeparateRunner:
    """A forward for each context: right for every model."""

    shared_bytes = 0

    def run(self, work: Work) -> torch.Tensor:
        """As `Runner.run`."""
        return torch.stack([context.advance(ids) for context, ids in work])

    def settle(self, context: Context) -> None:
        """Nothing is lacking."""


class PackedRunner:
    """One forward for all contexts.

    Args:
        model: one that `can_pack` allows.
    """

    shared_bytes = 0

    def __init__(self, model: PreTrainedModel) -> None:
        inspected = inspect_loaded(model)
        self._model, self._modules = model, {**inspected.modules, **inspected.windowed}
        self._launches = KeptLaunches()
        self._picks_logits = "logits_to_keep" in inspect.signature(model.forward).parameters

    @torch.no_grad()
    def run(self, work: Work) -> torch.Tensor:
        """As `Runner.run`."""
        device = self._model.device
        with ExitStack() as stack:
            segments: list[Segment] = []
            for context, ids in work:
                stack.enter_context(context.extending(ids))
                start = segments[-1].columns.stop if segments else 0
                segments.append(Segment(context.cache, len(context.ids), start, len(ids)))
                if isinstance(context.cache, XKVCache):
                    context.cache.serve(torch.tensor([ids], device=device))
            row = torch.tensor([[token for _, ids in work for token in ids]], device=device)
            positions = [torch.arange(one.held, one.held + one.count) for one in segments]
            ends = torch.tensor([one.columns.stop - 1 for one in segments], device=device)
            out: Any = self._model(
                input_ids=row,
                position_ids=torch.cat(positions)[None].to(device),
                attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device),  # made by each layer
                past_key_values=PackedCache(segments, self._modules, self._launches),
                use_cache=True,
                **({"logits_to_keep": ends} if self._picks_logits else {}),
            )
            logits: torch.Tensor = out.logits[0] if self._picks_logits else out.logits[0, ends]
            return logits.float()

    def settle(self, context: Context) -> None:
        """Nothing is lacking."""


def make_runner(model: PreTrainedModel, rebuilt_bytes: int = 0) -> Runner:
    """The fastest runner that is right for the model. Call it inside `enable_xkv`, before others run it.

    Where kernels run, the model's products are joined: its weights are on a GPU, and no file's any more.

    Args:
        rebuilt_bytes: on the device, for keys and values of prefixes that many sequences decode from; where
            no kernels run nothing is rebuilt.
    """
    reason = _why_separate(model)
    if reason is None and kernels_run(model.device):
        from xkv_service.engine.graph_runner import GraphRunner

        if join_products(model):
            _log.info("products of one input are joined")
        return GraphRunner(model, rebuilt_bytes)
    if rebuilt_bytes:
        _log.warning("no prefix is kept rebuilt: that takes a GPU, and a model that kernels decode")
    if reason is None:
        return PackedRunner(model)
    _log.info("sequences run one after the other: %s", reason)
    return SeparateRunner()


def _why_separate(model: PreTrainedModel) -> str | None:
    """Why the model cannot run packed, or None."""
    layout = inspect_loaded(model).layout
    for layer in layout.layers:
        if layer.kind not in ("full", "sliding"):
            return f"layer {layer.index} has {layer.kind} attention"
    config = model.config.get_text_config(decoder=True)
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        return f"it has layers of {', '.join(sorted(kinds))}"
    if frequency_change(model.config) is not None:
        return "its rotary frequencies depend on the length of a sequence"
    return _self_check(model)


@torch.no_grad()
def _self_check(model: PreTrainedModel) -> str | None:
    """Two short sequences must come out as each alone, prompt and next token."""
    vocabulary = int(model.config.get_text_config(decoder=True).vocab_size)
    prompts = [[(7 * place + 3) % vocabulary for place in range(size)] for size in (5, 9)]
    worst = 0.0
    try:
        together = [(empty_context(model), ids) for ids in prompts]
        packed = PackedRunner(model)
        apart = [(empty_context(model), ids) for ids in prompts]
        for _ in range(2):
            left, right = packed.run(together), SeparateRunner().run(apart)
            worst = max(worst, float((left - right).abs().amax() / right.abs().amax().clamp_min(1e-6)))
            together, apart = ([(context, [1]) for context, _ in work] for work in (together, apart))
    except (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError) as error:
        return f"packed tokens do not run ({type(error).__name__})"
    allowed = _TOLERANCE.get(model.dtype, 1e-3)
    return None if worst <= allowed else f"packed tokens come out differently (by {worst:.3g})"
