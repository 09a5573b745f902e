"""How documents are counted."""

from __future__ import annotations

from xkv_artifacts.manifest import DocumentRef
from xkv_workers.messages import Stored
from xkv_workers.report import Ledger


def document(uri: str) -> DocumentRef:
    return DocumentRef(uri=uri, sha256="0" * 64)


def stored(artifact_id: str, fidelity: float = 1.0) -> Stored:
    return Stored(artifact_id, tokens=100, bytes_full=8000, bytes_stored=1000, fidelity=fidelity, kl=0.0)


def test_documents_with_the_same_tokens_share_an_artifact_that_is_counted_once() -> None:
    ledger = Ledger()
    assert ledger.plan("a", document("one.txt"))
    assert not ledger.plan("a", document("two.txt"))
    ledger.store(stored("a"), computed=True)
    report = ledger.report(1.0)
    assert (report.documents, report.computed, report.reused, report.failed) == (2, 1, 1, 0)
    assert (report.tokens, report.bytes_full, report.bytes_stored, report.ratio) == (100, 8000, 1000, 8.0)
    assert [line.document for line in report.artifacts] == ["one.txt", "two.txt"]


def test_a_failed_artifact_fails_all_its_documents() -> None:
    ledger = Ledger()
    ledger.plan("a", document("one.txt"))
    ledger.plan("a", document("two.txt"))
    ledger.plan("b", document("three.txt"))
    ledger.reject("bad.txt", "empty")
    ledger.fail("a", "out of memory")
    ledger.store(stored("b"), computed=False)
    assert ledger.settled == 4
    report = ledger.report(1.0)
    assert (report.documents, report.computed, report.reused, report.failed) == (4, 0, 1, 3)
    assert [error.document for error in report.errors] == ["bad.txt", "one.txt", "two.txt"]


def test_fidelity_is_summed_up_by_worst_and_median() -> None:
    ledger = Ledger()
    for name, fidelity in (("a", 0.5), ("b", 0.9), ("c", 1.0)):
        ledger.plan(name, document(name))
        ledger.store(stored(name, fidelity), computed=True)
    report = ledger.report(1.0)
    assert (report.worst_fidelity, report.median_fidelity) == (0.5, 0.9)
    assert [line.document for line in report.low_fidelity] == ["a"]


def test_an_empty_report_has_every_field() -> None:
    report = Ledger().report(0.0)
    assert report.as_dict() == {
        "documents": 0,
        "computed": 0,
        "reused": 0,
        "failed": 0,
        "errors": (),
        "tokens": 0,
        "bytes_full": 0,
        "bytes_stored": 0,
        "ratio": 0.0,
        "seconds": 0.0,
        "calibration": None,
        "artifacts": (),
    }
    assert report.worst_fidelity is None and report.median_fidelity is None
