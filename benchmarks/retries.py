"""Documents unlike a calibration's sample: how faithful at 20x, and compressed again to half of it.

    python benchmarks/retries.py --out benchmarks/results/retries.json

Divergence (nats) from the exact cache on each document's last tokens, as every artifact states it: at the
ratio, and at half of it with bases of the document's own and with the calibration's, which is what
`precompute --on-low-fidelity retry` chooses from. The texts are files of this repository.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from bundled import load
from report import Report, command

from xkv_service.calibration.choice import calibrated_spec
from xkv_service.calibration.storage import read_calibration_file
from xkv_service.compression import compress_each
from xkv_service.demo import demo_calibration_path
from xkv_service.modeling.prompts import render_prefix
from xkv_workers.low_fidelity import Standard, retry_specs

ROOT = Path(__file__).resolve().parents[1]
TEXTS = (
    "docs/quality.md",
    "docs/format.md",
    "docs/serving.md",
    "docs/robustness.md",
    "LICENSE",
    "artifacts/xkv_artifacts/store.py",
    "xkv_service/engine/engine.py",
    "benchmarks/report.py",
)


def main() -> None:
    """Measure each text; print a table, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/retries.json"))
    parser.add_argument("--ratio", type=float, default=20.0)
    parser.add_argument("--tokens", type=int, default=6000, help="of each text at most")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    loaded, calibration = load(), read_calibration_file(demo_calibration_path())
    report = Report("retries", command(), "the same documents at the whole ratio")
    first = calibrated_spec(arguments.ratio, calibration)
    for name in TEXTS:
        ids = torch.tensor(render_prefix(loaded.tokenizer, (ROOT / name).read_text("utf-8")))
        ids = ids[: arguments.tokens]
        specs = (first, *retry_specs(first))
        made = {factors.spec: factors for factors in compress_each(loaded.model, ids, specs, calibration)}
        found = [made[spec].fidelity if spec in made else None for spec in specs]
        kl = [None if one is None else one.kl for one in found]
        whole = found[0]
        low = whole is not None and Standard(calibration=calibration).is_low(whole, arguments.ratio)
        report.add(document=name, tokens=len(ids), low=low, whole=kl[0], half_own=kl[1], half_shared=kl[2])
    report.write(arguments.out, ratio=arguments.ratio, calibration=calibration.id)


if __name__ == "__main__":
    main()
