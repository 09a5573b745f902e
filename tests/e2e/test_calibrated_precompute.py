"""`xkv precompute` with a calibration in the store: which one is taken, and what is said of it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from calibration_samples import calibration
from command_runs import Done, Xkv, words
from model_folder import save_tiny_model

from xkv_artifacts.store import ArtifactStore
from xkv_service.calibration.calibrate import calibrate
from xkv_service.calibration.probes import ProbedPrefix
from xkv_service.calibration.settings import CalibrationSettings
from xkv_service.calibration.storage import save_calibration
from xkv_service.modeling.model_files import find_model
from xkv_service.modeling.models import load_model
from xkv_service.modeling.prompts import render_prefix

Run = Callable[..., Done]


def calibrate_into(store: Path, model: Path, **figures: object) -> str:
    """Calibrate a model on three short documents, quickly; `figures` stand in for what was measured."""
    loaded = load_model(model, device="cpu")
    texts = [words(500, seed=seed) for seed in (7, 8, 9)]
    sample = [ProbedPrefix.of_text(text[-9:], render_prefix(loaded.tokenizer, text)) for text in texts]
    settings = CalibrationSettings(
        ratio=2.0, ratios=(2.0,), weightings=("plain",), tolerance_documents=1, most_ratio=2.0
    )
    found = calibrate(loaded.model, sample, settings)
    found = replace(found, figures={**found.figures, **figures})
    with ArtifactStore.open(str(store)) as opened:
        return save_calibration(opened, found, loaded.identity, sample).id


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> tuple[Path, str]:
    """A store with a calibration of the tiny model, and its id."""
    store = tmp_path_factory.mktemp("calibrated") / "store"
    return store, calibrate_into(store, tiny_model)


@pytest.fixture
def document(tmp_path: Path) -> Path:
    (tmp_path / "docs").mkdir()
    path = tmp_path / "docs" / "one.txt"
    path.write_text(words(700, seed=3))
    return path


@pytest.fixture
def run(xkv: Xkv, shared: tuple[Path, str], tiny_model: Path) -> Run:
    def run(command: str, *arguments: object) -> Done:
        return xkv(command, "--store", shared[0], "--model", tiny_model, "--ratio", "2", *arguments)

    return run


def test_the_models_calibration_is_taken_and_found_again(
    run: Run, xkv: Xkv, shared: tuple[Path, str], document: Path, ray_address: str
) -> None:
    store, made = shared
    ray = ["--workers", "1", "--ray-address", ray_address]
    foreseen = run("precompute", "--docs", document, "--dry-run", "--json").json
    first = run("precompute", "--docs", document, *ray, "--json").json
    assert first["calibration"] == foreseen["calibration"] == made
    assert (first["computed"], first["failed"]) == (1, 0), first
    artifact = first["artifacts"][0]
    assert artifact["id"] == foreseen["plan"][0]["id"] and artifact["ratio"] >= 2
    assert artifact["bytes"] <= foreseen["plan"][0]["bytes"]
    again = run("precompute", "--docs", document, *ray)
    assert "reused            1" in again.out and made[:12] in again.out

    answered = run("ask", "--doc", document, "--max-tokens", "2", "--json", "Why?").json
    assert answered["artifact"] == artifact["id"]
    spec = xkv("show", artifact["id"], "--store", store, "--json").json["spec"]
    assert (spec["calibration"], spec["basis"], spec["index"]) == (made, "calibrated", "derived")
    told = " ".join(xkv("show", artifact["id"], "--store", store).out.split())
    assert f"calibration {made} " in told
    assert ("verdict low: above" if artifact["low"] else "verdict not low: at most") in told

    refused = xkv("calibrations", "rm", made[:8], "--store", store)
    assert refused.code == 1 and "1 stored artifact cannot be used without it" in refused.err


def test_parts_are_measured_where_that_is_asked_for(
    run: Run, xkv: Xkv, shared: tuple[Path, str], tmp_path: Path, ray_address: str
) -> None:
    """The id stays what it was, and what is stored already is not measured again."""
    (tmp_path / "parts.txt").write_text(words(600, seed=14))
    made = ["precompute", "--docs", tmp_path / "parts.txt"]
    ray = ["--workers", "1", "--ray-address", ray_address, "--json"]
    plan = run(*made, "--dry-run", "--json").json["plan"]
    report = run(*made, "--parts", *ray).json
    name = report["artifacts"][0]["id"]
    assert name == plan[0]["id"] and report["parts"] == {"measured": 1, "unmeasured": []}
    parts = xkv("show", name, "--store", shared[0], "--json").json["fidelity"]["parts"]
    assert parts and {part["share"] for part in parts} <= {0.5, 0.75}
    assert all(0 <= part["top1_agreement"] <= 1 and part["kl"] > 0 for part in parts)
    told = " ".join(xkv("show", name, "--store", shared[0]).out.split())
    first, whole = parts[0], xkv("show", name, "--store", shared[0], "--json").json["fidelity"]["kl"]
    assert f"KL divergence {whole:.3g} nats" in told
    share = {0.5: "half", 0.75: "three quarters"}[first["share"]]
    agreement = f"{100 * first['top1_agreement']:.1f} % same next token, {first['kl']:.3g} nats"
    assert f"leading {share} of columns, in whole blocks: {agreement}" in told
    again = run(*made, *ray).json
    assert again["reused"] == 1 and "parts" not in again
    assert run(*made, "--parts", *ray).json["parts"] == report["parts"]
    assert xkv("rm", name, "--store", shared[0]).code == 0
    assert run(*made, *ray).json["artifacts"][0]["id"] == name
    assert "parts" not in xkv("show", name, "--store", shared[0], "--json").json["fidelity"]


def test_what_is_stored_without_parts_is_told(
    run: Run, xkv: Xkv, shared: tuple[Path, str], tmp_path: Path, ray_address: str
) -> None:
    """All but what is too short to have parts: removing it would bring nothing."""
    for name, count in (("long", 600), ("short", 20)):
        (tmp_path / f"{name}.txt").write_text(words(count, seed=15))
    docs = [f"{tmp_path}/{name}.txt" for name in ("long", "short")]
    made = ["precompute", "--docs", *docs, "--workers", "1", "--ray-address", ray_address]
    artifacts = run(*made, "--json").json["artifacts"]
    (long,) = [line["id"] for line in artifacts if line["document"] == "long.txt"]
    assert run(*made, "--parts", "--json").json["parts"] == {"measured": 0, "unmeasured": [long]}
    told = run(*made, "--parts")
    assert "with parts        0 artifacts" in told.out
    assert f"parts of 1 artifact stored before were not measured ({long[:12]})" in told.err
    assert "remove each with `xkv rm ID` and run xkv precompute --parts again" in told.err
    assert xkv("rm", long, "--store", shared[0]).code == 0
    told = run(*made, "--parts")
    assert "with parts        1 artifact " in told.out and "xkv rm" not in told.err


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        (["--calibration", "none"], "see `xkv calibrate`, or leave --parts out"),
        (["--rank-k", "16", "--rank-v", "16"], "see `xkv calibrate`, or leave --parts out"),
        (["--ratio", "2", "--basis", "document"], "leave --basis document out, or leave --parts out"),
    ],
)
def test_parts_need_the_bases_of_a_calibration(
    xkv: Xkv, shared: tuple[Path, str], tiny_model: Path, document: Path, options: list[str], hint: str
) -> None:
    common = ["--store", shared[0], "--model", tiny_model, "--docs", document, "--dry-run"]
    refused = xkv("precompute", *common, "--parts", *options)
    assert refused.code == 1 and f"hint: {hint}\n" in refused.err, refused
    assert (
        "parts of artifacts without a calibration's bases are not good enough to answer from" in refused.err
    )


def test_parts_where_validation_spoke_for_bases_of_each_documents_own(
    xkv: Xkv, tiny_model: Path, document: Path, tmp_path: Path
) -> None:
    calibrate_into(tmp_path / "own", tiny_model, validation=[{"step": "bits", "asked": 2.0, "kl": 0.0}])
    common = ["--store", tmp_path / "own", "--model", tiny_model, "--docs", document, "--ratio", "2"]
    refused = xkv("precompute", *common, "--parts", "--dry-run")
    assert refused.code == 1 and "hint: give --basis calibrated, or leave --parts out" in refused.err, refused
    assert xkv("precompute", *common, "--parts", "--basis", "calibrated", "--dry-run").code == 0


def test_asking_and_precomputing_make_the_same_artifact(run: Run, tmp_path: Path) -> None:
    document = tmp_path / "asked.txt"
    document.write_text(words(650, seed=4))
    answered = run("ask", "--doc", document, "--max-tokens", "1", "--json", "Why?").json
    plan = run("precompute", "--docs", document, "--dry-run", "--json").json["plan"]
    assert (plan[0]["id"], plan[0]["action"]) == (answered["artifact"], "reuse")


def test_options_choose_otherwise(run: Run, shared: tuple[Path, str], document: Path) -> None:
    ids = set()
    for options, expected in (
        (["--calibration", shared[1][:8]], shared[1]),
        (["--basis", "document"], shared[1]),
        (["--bits", "4"], shared[1]),
        (["--calibration", "none"], None),
        (["--group-size", "2"], None),
    ):
        foreseen = run("precompute", "--docs", document, "--dry-run", "--json", *options).json
        assert foreseen["calibration"] == expected, options
        ids.add(foreseen["plan"][0]["id"])
    assert len(ids) == 5


@pytest.mark.parametrize(
    ("options", "code", "expected"),
    [
        (["--calibration", "0000"], 1, "no calibration begins with 0000"),
        (["--calibration", "zz"], 1, "'zz' is not a calibration id"),
        (["--calibration", "3fa9c1", "--group-size", "2"], 2, "both given"),
        (["--calibration", "none", "--bits", "mixed"], 2, "bits mixed: with calibration none there is no"),
    ],
)
def test_what_cannot_be_is_one_line(
    run: Run, document: Path, options: list[str], code: int, expected: str
) -> None:
    done = run("precompute", "--docs", document, "--dry-run", *options)
    assert done.code == code and expected in done.err, done
    assert "Traceback" not in done.err and "unexpected" not in done.err


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ("model.safetensors", "other weights"),
        ("chat_template.jinja", "another tokenizer"),
        ("tokenizer.json", "another tokenizer"),
        ("config.json", "another config"),
        ("dtype", "another dtype (bfloat16, not float32)"),
        ("everything", "another dtype (bfloat16, not float32), other weights"),
        ("nothing recorded", ""),
    ],
)
def test_a_refusal_names_what_differs(
    xkv: Xkv, tiny_model: Path, document: Path, tmp_path: Path, changed: str, named: str
) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_model, other)
    if changed in ("model.safetensors", "everything", "nothing recorded"):
        save_tiny_model(other, seed=1)
    elif changed != "dtype":
        (other / changed).write_bytes((other / changed).read_bytes() + b"\n")
    dtype = "bfloat16" if changed in ("dtype", "everything") else "float32"
    made_for = find_model(other, dtype=dtype, device="cpu").identity
    assert made_for.parts is not None
    if changed == "nothing recorded":
        made_for = made_for.model_copy(update={"parts": None})
    manifest, tensors = calibration()
    with ArtifactStore.open(str(tmp_path / "store")) as store:
        made = store.calibrations.publish(manifest.model_copy(update={"model": made_for}), tensors).id
    command = ["precompute", "--store", tmp_path / "store", "--docs", document, "--dry-run"]
    done = xkv(*command, "--model", tiny_model, "--calibration", made)
    assert done.code == 1 and f"calibration {made[:12]} was made for other ({dtype}, " in done.err, done
    refusal = done.err.split("not for tiny ")[1].splitlines()[0]
    assert refusal.partition(": ")[2] == (f"it is of {named}" if named else "")
    assert "run `xkv calibrate` for this model" in done.err


def test_another_models_calibration_is_refused_by_name(
    run: Run, xkv: Xkv, shared: tuple[Path, str], document: Path, tmp_path: Path
) -> None:
    store, made = shared
    save_tiny_model(tmp_path / "other", seed=1)
    command = ["precompute", "--store", store, "--docs", document, "--dry-run", "--ratio", "2"]
    command += ["--model", tmp_path / "other"]
    assert xkv(*command, "--json").json["calibration"] is None
    done = xkv(*command, "--calibration", made)
    assert done.code == 1, done
    assert f"calibration {made[:12]} was made for tiny" in done.err and "not for other" in done.err
    done = xkv(*command, "--basis", "calibrated")
    assert done.code == 1 and "the store has no calibration of this model" in done.err


def test_a_damaged_calibration_is_put_aside(
    xkv: Xkv, tiny_model: Path, document: Path, tmp_path: Path
) -> None:
    store = tmp_path / "own"
    made = calibrate_into(store, tiny_model)
    with ArtifactStore.open(str(store)) as opened:
        opened.calibrations.publish(*calibration(hours=2))  # of another model, and newer
    blob = store / "calibrations" / made[:2] / f"{made}.safetensors"
    content = bytearray(blob.read_bytes())
    content[-1] ^= 1
    blob.write_bytes(content)
    command = ["precompute", "--store", store, "--docs", document, "--dry-run", "--model", tiny_model]
    command += ["--ratio", "2"]
    done = xkv(*command)
    assert done.code == 1 and made[:12] in done.err and "run xkv calibrate again" in done.err, done
    assert not blob.exists()
    assert xkv(*command, "--json").json["calibration"] is None


def test_an_artifact_of_low_fidelity_is_compressed_again(
    xkv: Xkv, tiny_model: Path, document: Path, tmp_path: Path, ray_address: str
) -> None:
    store = tmp_path / "strict"
    made = calibrate_into(store, tiny_model, thresholds=[{"ratio": 8.0, "worst": 0.0, "kl": 0.0}])
    common = ["--store", store, "--model", tiny_model, "--docs", document, "--ratio", "6"]
    run = ["precompute", *common, "--workers", "1", "--ray-address", ray_address]
    failed = xkv(*run, "--on-low-fidelity", "fail", "--json")
    assert failed.code == 1 and "is low: not published" in failed.json["errors"][0]["reason"]

    planned = xkv("precompute", *common, "--dry-run", "--json").json["plan"][0]["id"]
    first = xkv(*run, "--json").json
    (line,) = first["artifacts"]
    assert (first["computed"], first["failed"]) == (1, 0), first
    assert line["id"] != planned and 2.5 < line["ratio"] < 6
    assert line["retried"]["kl_now"] < line["retried"]["kl"]
    shown = xkv("show", line["id"], "--store", store, "--json").json
    spec = shown["spec"]
    assert (spec["ratio"], spec["calibration"]) == (3, made)
    assert line["low"], "against a threshold of nothing"
    assert (shown["low"], shown["kl_limit"], shown["fidelity"]["kl_limit"]) == (True, 0, 0)
    assert shown["instead_of"] == planned
    told = " ".join(xkv("show", line["id"], "--store", store).out.split())
    assert f"verdict low: above 0.0000 nats, the limit of calibration {made[:12]} at 3x" in told
    assert f"made at 3x instead of artifact {planned[:12]}, whose fidelity was low" in told
    (listed,) = xkv("ls", "--store", store, "--json").json["artifacts"]
    assert (listed["low"], listed["kl_limit"], listed["kl"]) == (True, 0, shown["fidelity"]["kl"])
    assert "! low fidelity" in xkv("ls", "--store", store).out

    again = xkv(*run, "--json").json
    assert (again["computed"], again["reused"]) == (0, 1)
    assert again["artifacts"] == [{**line, "retried": None}]
    foreseen = xkv("precompute", *common, "--dry-run", "--json").json["plan"][0]
    assert (foreseen["action"], foreseen["id"]) == ("reuse", line["id"])
    asked = ["ask", "--doc", document, "--store", store, "--model", tiny_model, "--ratio", "6", "Why?"]
    assert xkv(*asked, "--max-tokens", "1", "--json").json["artifact"] == line["id"]

    # The same artifact made by wish does not stand in for the one that is asked for.
    wished = ["--namespace", "wished", "--basis", spec["basis"]]
    made_by_wish = xkv(*run[:-2], "--ray-address", ray_address, "--ratio", "3", *wished, "--json").json
    assert made_by_wish["computed"] == 1
    told = xkv(*run, "--namespace", "wished")
    assert "one.txt was compressed again, to 3." in told.err and "KL" in told.err


def test_stored_artifacts_of_low_fidelity_are_treated_as_new_ones(
    xkv: Xkv, tiny_model: Path, document: Path, tmp_path: Path, ray_address: str
) -> None:
    store = tmp_path / "kept"
    made = calibrate_into(store, tiny_model, thresholds=[{"ratio": 8.0, "worst": 0.0, "kl": 0.0}])
    common = ["--store", store, "--model", tiny_model, "--docs", document, "--ratio", "6"]
    run = ["precompute", *common, "--workers", "1", "--ray-address", ray_address]
    kept = xkv(*run, "--on-low-fidelity", "keep", "--json").json["artifacts"][0]
    assert kept["low"] and kept["retried"] is None
    again = xkv(*run, "--on-low-fidelity", "keep", "--json").json
    assert (again["reused"], again["artifacts"]) == (1, [kept])
    assert "1 of 1 documents have a low fidelity" in xkv(*run, "--on-low-fidelity", "keep").err

    refused = xkv(*run, "--on-low-fidelity", "fail", "--json")
    assert refused.code == 1 and refused.json["computed"] == 0
    assert "which is low: lower --ratio" in refused.json["errors"][0]["reason"]
    foreseen = xkv("precompute", *common, "--on-low-fidelity", "fail", "--dry-run", "--json").json
    assert foreseen["failed"] == 1

    assert xkv("precompute", *common, "--dry-run", "--json").json["compute"] == 1
    better = xkv(*run, "--json").json
    assert better["computed"] == 1 and better["artifacts"][0]["id"] != kept["id"]
    assert xkv(*run, "--json").json["computed"] == 0

    # What nothing else was better for is not computed for ever: it says so itself.
    last = [*run, "--ratio", "1", "--namespace", "last", "--json"]
    first, second = xkv(*last).json, xkv(*last).json
    assert (first["computed"], second["computed"], second["reused"]) == (1, 0, 1), (first, second)
    assert first["artifacts"][0]["low"] and first["artifacts"][0]["retried"] is None
    shown = xkv("show", first["artifacts"][0]["id"], "--store", store, "--json").json
    assert shown["retried"] and shown["spec"]["calibration"] == made
    told = " ".join(xkv("show", shown["id"], "--store", store).out.split())
    assert "compressed again nothing else was better" in told
