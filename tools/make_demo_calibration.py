"""Calibrate a model that `train_demo_model.py` made, on documents and questions of the demo's generator.

    python tools/make_demo_calibration.py --documents 16 --device cuda --out calibration.safetensors

The documents are others than those of `examples/corpus` and of every evaluation.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from xkv_service.calibration.calibrate import calibrate
from xkv_service.calibration.metrics import WEIGHTINGS
from xkv_service.calibration.probes import ProbedPrefix
from xkv_service.calibration.settings import CalibrationSettings
from xkv_service.calibration.storage import calibration_manifest, write_calibration_file
from xkv_service.demo import demo_model_path
from xkv_service.evaluation.probed import probed_document
from xkv_service.modeling.models import LoadedModel, load_model

TASKS = ("demo_documents", "demo_documents", "demo_documents", "demo_niah_multikey_1")


def main() -> None:
    """Make the sample, calibrate, write the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--figures", type=Path, help="write what was measured, as JSON")
    parser.add_argument("--model", default=str(demo_model_path()))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--documents", type=int, default=24)
    parser.add_argument("--questions", type=int, default=6, help="questions about each")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--weightings", nargs="+", choices=WEIGHTINGS, default=WEIGHTINGS, metavar="METRIC")
    parser.add_argument("--group-size", type=int, default=CalibrationSettings.group_size, help="at most")
    arguments = parser.parse_args()
    loaded = load_model(arguments.model, device=arguments.device, dtype="float32")
    sample = [_document(loaded, number, arguments) for number in range(arguments.documents)]
    settings = CalibrationSettings(weightings=tuple(arguments.weightings), group_size=arguments.group_size)
    with torch.no_grad():
        found = calibrate(loaded.model, sample, settings, print)
    write_calibration_file(arguments.out, calibration_manifest(found, loaded.identity, sample), found)
    if arguments.figures:
        arguments.figures.write_text(json.dumps(found.figures, indent=1) + "\n", "utf-8")


def _document(loaded: LoadedModel, number: int, arguments: argparse.Namespace) -> ProbedPrefix:
    task = TASKS[(number + number // len(TASKS)) % len(TASKS)]  # every fourth is held out: of several tasks
    return probed_document(
        loaded.tokenizer, task, f"calibration {number}", arguments.tokens, arguments.questions
    )


if __name__ == "__main__":
    main()
