"""Bytes that a loaded prefix holds and seconds to make its index: for every layer, or as a calibration chose.

    python benchmarks/resident.py --out benchmarks/results/resident.json

The exact cache is counted at 16 bits a number. Stored bytes and index are what grows with every document
at least; resident bytes are all storages that the prefix reaches on the
device, as this machine holds them (cos and sin of its positions among them), but the bases all share. The
baseline of the seconds rebuilds whole keys of every layer; they are processor time, the least of three.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bundled import document_ids
from report import Report, command
from transformers import PreTrainedModel

from xkv_service.calibration.calibration import Calibration
from xkv_service.calibration.choice import calibrated_spec
from xkv_service.calibration.storage import read_calibration_file
from xkv_service.compression import factorize_prefill
from xkv_service.decoding.derived_index import derived_plainly, derived_sketches
from xkv_service.decoding.layer_prefix import LayerPrefix
from xkv_service.decoding.prefix import Prefix
from xkv_service.demo import demo_calibration_path, demo_model_path
from xkv_service.engine.storages import held_bytes
from xkv_service.factors import PrefixFactors
from xkv_service.modeling.models import load_model
from xkv_service.prefilling.prefill import prefill
from xkv_service.prefilling.prefilled import Prefill


def main() -> None:
    """Measure each ratio; print a table, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/resident.json"))
    parser.add_argument("--model", default=str(demo_model_path()))
    parser.add_argument("--calibration", type=Path, default=demo_calibration_path())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--ratios", type=float, nargs="+", default=[8.0, 20.0, 32.0])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    loaded = load_model(arguments.model, device=arguments.device)
    calibration = read_calibration_file(arguments.calibration)
    report = Report("resident", command(), "every layer has an index, of whole keys")
    with torch.no_grad():
        exact = prefill(loaded.model, document_ids(loaded, arguments.tokens))
        for ratio in arguments.ratios:
            for row in _rows(loaded.model, exact, calibration, ratio):
                report.add(**row)
    report.write(arguments.out, tokens=arguments.tokens)


def _rows(
    model: PreTrainedModel, exact: Prefill, calibration: Calibration, ratio: float
) -> list[dict[str, Any]]:
    chosen = calibrated_spec(ratio, calibration)
    rows: list[dict[str, Any]] = []
    for name, spec in (("every layer", replace(chosen, reuse=())), ("as calibrated", chosen)):
        factors, _ = factorize_prefill(model, exact, spec, calibration)
        prefix = Prefix.of(model, factors)
        index = _index_bytes(prefix)
        held = held_bytes(prefix.layers, device=model.device) - _shared_bytes(prefix)
        rows.append(
            {
                "ratio": ratio,
                "index of": name,
                "layers": len(factors.planes),
                "index_bytes_a_token": index / exact.tokens,
                "stored_and_index_ratio": factors.bytes_full / (factors.nbytes + index),
                "resident_bytes_a_token": held / exact.tokens,
                "resident_ratio": factors.bytes_full / held,
                "without_turns_ratio": factors.bytes_full / (held - _turn_bytes(prefix)),
                "whole_keys_ms": _milliseconds(partial(_plainly, factors, prefix)),
                "index_ms": _milliseconds(partial(_quickly, factors, prefix)),
            }
        )
        rows[-1]["faster"] = rows[0]["whole_keys_ms"] / rows[-1]["index_ms"]
    return rows


def _owners(factors: PrefixFactors, prefix: Prefix) -> list[LayerPrefix]:
    layers = [prefix.layers[layer] for layer in factors.planes]
    return [layer for layer in layers if isinstance(layer, LayerPrefix)]


def _plainly(factors: PrefixFactors, prefix: Prefix) -> None:
    for layer in _owners(factors, prefix):
        derived_plainly(layer.keys, factors.planes[layer.layer].to(layer.positions.device), layer.tokens)


def _quickly(factors: PrefixFactors, prefix: Prefix) -> None:
    for group in factors.groups:
        mine = [layer for layer in _owners(factors, prefix) if layer.layer in group.layout.layers]
        derived_sketches(group.keys.factors, mine, factors.planes)


def _index_bytes(prefix: Prefix) -> int:
    return held_bytes([layer.index for layer in prefix.layers.values()], device=prefix.model.device)


def _shared_bytes(prefix: Prefix) -> int:
    """Bases of a calibration, which every prefix of the model reads."""
    layers = [layer for layer in prefix.layers.values() if isinstance(layer, LayerPrefix)]
    keys = [layer.key_bases for layer in layers if layer.key_scales is not None]
    values = [layer.value_bases for layer in layers if layer.value_scales is not None]
    return held_bytes(keys, values, device=prefix.model.device)


def _turn_bytes(prefix: Prefix) -> int:
    layers = [layer.turns for layer in prefix.layers.values() if isinstance(layer, LayerPrefix)]
    return held_bytes(layers, device=prefix.model.device)


def _milliseconds(function: Callable[[], None]) -> float:
    """Processor time; a GPU's is waited for, and its time on the clock."""
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    taken = []
    for _ in range(3):
        started = clock()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        taken.append(1000 * (clock() - started))
    return min(taken)


if __name__ == "__main__":
    main()
