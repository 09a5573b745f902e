"""What is in a store cannot command the terminal of whoever looks at it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from compressed import manifest_of, random_ids
from families import tiny_model

from xkv_artifacts.keys import artifact_id
from xkv_artifacts.manifest import PrefixManifest
from xkv_artifacts.store import ArtifactStore
from xkv_cli import render
from xkv_cli.main import xkv
from xkv_cli.plain_text import escaped
from xkv_service import CompressionSpec, compress
from xkv_workers.report import DocumentError

EVIL = "evil\u001b]0;pwned\u0007\u001b[31mred\r\n\u009b5m\u202eexe.txt\u2028\u200b"
SHOWN = r"evil\x1b]0;pwned\x07\x1b[31mred\r\n\x9b5m\u202eexe.txt\u2028\u200b"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A store with one artifact, whose document, model and architecture have evil names."""
    model, path = tiny_model("llama"), tmp_path_factory.mktemp("store")
    fields = manifest_of(
        compress(model, ids := random_ids(80), CompressionSpec(rank_k=24, rank_v=24))
    ).model_dump()
    fields["document"]["uri"] = EVIL
    fields["model"] |= {"name": EVIL, "architecture": EVIL}
    fields["id"] = artifact_id(fields["model"]["fingerprint"], "default", ids.tolist(), fields["spec"])
    factors = compress(model, ids, CompressionSpec(rank_k=24, rank_v=24))
    with ArtifactStore.open(str(path)) as store:
        store.publish(PrefixManifest(**fields), factors.to_tensors())
        yield path


def harmless(text: str) -> bool:
    """Nothing but lines of characters that can be seen."""
    return all(line.isprintable() for line in text.split("\n"))


def told(*arguments: str) -> Result:
    result = CliRunner().invoke(xkv, arguments, standalone_mode=False)
    assert result.exception is None, result.exception
    return result


def test_a_listing_and_a_description_show_what_they_found(folder: Path) -> None:
    listing = told("ls", "--store", str(folder)).output
    (line,) = [line for line in listing.splitlines() if "evil" in line]
    assert SHOWN in line and harmless(listing)
    shown = told("show", line.split()[0], "--store", str(folder)).output
    assert shown.count(SHOWN) == 3 and harmless(shown)


def test_errors_and_warnings_too(capsys: pytest.CaptureFixture[str]) -> None:
    render.errors([DocumentError(EVIL, EVIL)])
    render.warn(EVIL)
    render.complain(EVIL, EVIL)
    shown = capsys.readouterr().err
    assert shown.count(SHOWN) == 5 and harmless(shown)


def test_other_people_s_letters_stay() -> None:
    for name in ("Übersicht 2026.md", "漢字\u3000手引き", "e\u0301té", "🙂", "שלום"):
        assert escaped(name) == name
