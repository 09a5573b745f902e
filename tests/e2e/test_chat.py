"""`xkv chat` and `xkv ask`: real model, store and files; what a person types comes through a pipe."""

from __future__ import annotations

import io
import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from command_runs import Done, Xkv, words

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "examples" / "corpus" / "bulletin-houston-lucky-dove-society.txt"

Talk = Callable[..., Done]


def _facts(count: int) -> list[tuple[str, str]]:
    """Questions about `DOCUMENT`, and the right answers."""
    lines = (ROOT / "examples" / "questions" / f"{DOCUMENT.stem}.questions.jsonl").read_text().splitlines()
    return [(one["question"], one["answer"]) for one in map(json.loads, lines[:count])]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("chat") / "store"


@pytest.fixture
def ask(xkv: Xkv, store: Path) -> Talk:
    return lambda *arguments: xkv("ask", "--store", store, *arguments)


@pytest.fixture
def chat(xkv: Xkv, store: Path, monkeypatch: pytest.MonkeyPatch) -> Talk:
    """Type lines into `xkv chat`."""

    def run(lines: list[str], *arguments: object) -> Done:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        return xkv("chat", "--store", store, *arguments)

    return run


@pytest.fixture
def artifact(ask: Talk) -> str:
    """The document's artifact in the store."""
    return str(ask("--doc", DOCUMENT, "--json", "What?", "--max-tokens", "1").json["artifact"])


def test_a_document_is_compressed_once_and_then_found(ask: Talk, xkv: Xkv, store: Path) -> None:
    question, answer = _facts(1)[0]
    first = ask("--doc", DOCUMENT, question)
    assert first.code == 0 and first.out == answer + "\n", first.err
    assert "compressing" in first.err
    again = ask("--doc", DOCUMENT, question, "--json")
    assert again.code == 0 and again.err == ""
    found = again.json
    assert list(found) == [
        "answer", "finish", "artifact", "document", "prompt_tokens", "cached_tokens", "generated_tokens",
        "rebuilt_tokens", "seconds", "first_token_seconds", "bytes", "bytes_full",
    ]  # fmt: skip
    assert (found["answer"], found["finish"]) == (answer, "stop")
    (listed,) = xkv("ls", "--store", store, "--json").json["artifacts"]
    assert (found["artifact"], found["bytes"]) == (listed["id"], listed["bytes"])
    assert found["cached_tokens"] == listed["tokens"] < found["prompt_tokens"]
    assert 0 < found["rebuilt_tokens"] < listed["tokens"] / 4


def test_precompute_finds_what_chat_stored(xkv: Xkv, artifact: str, store: Path) -> None:
    plan = xkv("precompute", "--docs", DOCUMENT, "--store", store, "--dry-run", "--json").json["plan"]
    assert [(line["id"], line["action"]) for line in plan] == [(artifact, "reuse")]


def test_a_document_stored_at_another_ratio_is_used_unless_one_is_asked_for(
    ask: Talk, xkv: Xkv, tmp_path: Path
) -> None:
    def asked(*more: object) -> Done:
        return xkv("ask", "--store", tmp_path / "store", "--doc", DOCUMENT, "--json", *more, "What?")

    stored = asked("--ratio", "4", "--max-tokens", "1").json["artifact"]
    assert asked("--max-tokens", "1").json["artifact"] == stored
    other = asked("--ratio", "6", "--max-tokens", "1")
    assert other.json["artifact"] != stored and "compressing" in other.err
    for blob in (tmp_path / "store").glob("prefixes/*/*.safetensors"):
        blob.unlink()
    lost = asked("--max-tokens", "1")
    gone = f"is missing: its file is gone from {tmp_path / 'store'}\n"
    assert lost.code == 0 and lost.err.count(gone) == 2 and "not in the store yet" in lost.err


@pytest.mark.parametrize("ratio", [4, 100])
def test_low_fidelity_is_told(xkv: Xkv, tmp_path: Path, ratio: int) -> None:
    at = ["--store", tmp_path / "store"]
    done = xkv("ask", *at, "--doc", DOCUMENT, "--ratio", ratio, "--max-tokens", 1, "What?")
    (listed,) = xkv("ls", *at, "--json").json["artifacts"]
    assert done.code == 0 and (listed["fidelity"] < 0.9) == (ratio == 100)
    assert ("answers may be wrong" in done.err) == (ratio == 100)


def test_an_artifact_is_asked_without_its_document(ask: Talk, artifact: str) -> None:
    for question, answer in _facts(3):
        done = ask("--artifact", artifact[:8], question)
        assert (done.code, done.out) == (0, answer + "\n"), done.err


@pytest.mark.parametrize("over", ["--doc", "--artifact"])
def test_the_exact_cache_answers_as_well(ask: Talk, artifact: str, over: str) -> None:
    question, answer = _facts(1)[0]
    done = ask(over, DOCUMENT if over == "--doc" else artifact, "--exact", "--json", question)
    found = done.json
    assert found["answer"] == answer and "prefilling" in done.err
    assert (found["artifact"], found["bytes"], found["rebuilt_tokens"]) == (None, 0, 0)


def test_exact_answers_need_no_store(xkv: Xkv, tmp_path: Path) -> None:
    done = xkv("ask", "--store", tmp_path / "none", "--doc", DOCUMENT, "--exact", "What?", "--max-tokens", 1)
    assert done.code == 0 and not (tmp_path / "none").exists()


def test_a_conversation_through_a_pipe(chat: Talk, artifact: str, tmp_path: Path) -> None:
    facts = _facts(3)
    saved = tmp_path / "talk.xkv"
    lines = [
        facts[0][0],
        "/exact",
        "",
        facts[1][0],
        "/stats",
        f"/save {saved}",
        "/reset",
        facts[2][0],
        "/quit",
    ]
    done = chat([*lines, "never read"], "--artifact", artifact)
    assert done.code == 0, done.err
    answers = [line for line in done.out.splitlines() if line in dict(facts).values()]
    assert answers == [facts[0][1], facts[0][1], facts[1][1], facts[2][1]]
    for figure in ("prefix", "tail", "exact cache", artifact[:12], "rebuilt for each token", "tokens/s"):
        assert figure in done.out
    assert "prefilling" in done.err and saved.exists()
    assert "> " not in done.out and "Traceback" not in done.err


def test_a_saved_conversation_goes_on(chat: Talk, artifact: str, tmp_path: Path) -> None:
    facts, file = _facts(3), tmp_path / "talk.xkv"
    whole = chat([question for question, _ in facts], "--artifact", artifact)
    begun = chat([facts[0][0]], "--artifact", artifact, "--session", file)
    assert begun.code == 0 and "saved to" in begun.err
    went_on = chat([facts[1][0]], "--session", file)
    ended = chat([facts[2][0]], "--session", file, "--doc", DOCUMENT)
    assert begun.out + went_on.out + ended.out == whole.out
    other = chat(["x"], "--session", file, "--selector", "dense")
    assert other.code == 1 and "the session was held with" in other.err
    about = chat(["x"], "--session", file, "--doc", ROOT / "README.md")
    assert about.code == 1 and "another document" in about.err


@pytest.mark.parametrize("file", ["/no/such/folder/talk.xkv", "/proc/talk.xkv", "."])
def test_a_file_that_cannot_be_saved_to_is_refused_before_the_talk(chat: Talk, file: str) -> None:
    done = chat(["What?"], "--doc", DOCUMENT, "--session", file)
    assert done.code == 2 and done.out == "" and "--session" in done.err


def test_a_line_that_cannot_be_answered_is_told_and_the_rest_goes_on(chat: Talk, artifact: str) -> None:
    question, answer = _facts(1)[0]
    done = chat(["/nonsense", "x<|end|>", "/exact", "/save", question], "--artifact", artifact)
    assert done.code == 1 and done.out == answer + "\n"
    assert "no command '/nonsense'" in done.err and "special token" in done.err
    assert "nothing was asked yet" in done.err and "no file to save to" in done.err


def test_system_prompts_and_raw_text_come_back_from_an_artifact(xkv: Xkv, tmp_path: Path) -> None:
    prompt = tmp_path / "system.txt"
    prompt.write_text("Answer from the document.")
    at = ["--store", tmp_path / "store", "--json", "--max-tokens", "2"]
    for made in (["--system-prompt", prompt], ["--template", "raw"]):
        stored = xkv("ask", *at, "--doc", DOCUMENT, *made, "What is it?").json
        found = xkv("ask", *at, "--artifact", stored["artifact"], "What is it?").json
        assert found["cached_tokens"] == stored["cached_tokens"]
        assert found["prompt_tokens"] - stored["prompt_tokens"] in range(-4, 1)


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (["--artifact", "0000"], 1, "no artifact begins with 0000"),
        (["--artifact", "zz"], 1, "is not an artifact id"),
        (["--doc", ROOT / "examples"], 1, "is a folder"),
        (["--doc", ROOT / "Makefile"], 1, "are not read"),
        ([], 2, "nothing to talk about: give --doc or --artifact\n"),
        (["--doc", DOCUMENT, "--artifact", "0000"], 2, "give one of them"),
        (["--doc", DOCUMENT, "--budget", "0"], 2, "budget=0"),
        (["--doc", DOCUMENT, "--budget", "x"], 2, "neither tokens"),
        (["--doc", DOCUMENT, "--temperature", "-1"], 2, "temperature=-1"),
        (["--doc", DOCUMENT, "--namespace", "a/b"], 2, "namespace"),
        (["--doc", DOCUMENT, "--ratio", "0.5"], 2, "ratio=0.5"),
        (["--doc", DOCUMENT, "--model", "/no/model"], 1, "no model folder"),
        (["--doc", "/no/document"], 2, "does not exist"),
    ],
)
def test_what_cannot_be_is_one_line(
    ask: Talk, artifact: str, arguments: list[object], code: int, expected: str
) -> None:
    done = ask(*arguments, "What?")
    assert (done.code, done.out) == (code, "") and expected in done.err
    assert "Traceback" not in done.err and "unexpected" not in done.err


def test_models_that_do_not_fit(ask: Talk, xkv: Xkv, artifact: str, tiny_model: Path, tmp_path: Path) -> None:
    other = ask("--artifact", artifact, "--model", tiny_model, "What?")
    assert other.code == 1 and "was made with model" in other.err and "--model" in other.err
    assert "it is of other weights, another tokenizer, another config" in other.err
    long = tmp_path / "long.txt"
    long.write_text(words(3000))
    tiny = ["--store", tmp_path / "store", "--model", tiny_model, "--doc", long]
    for more in ([], ["--exact"]):
        done = xkv("ask", *tiny, *more, "What?")
        assert done.code == 1 and "window" in done.err
    _without_template(tiny_model, tmp_path / "plain")
    short = tmp_path / "short.txt"
    short.write_text(words(300))
    plain = [
        "ask",
        "--store",
        tmp_path / "store",
        "--model",
        tmp_path / "plain",
        "--doc",
        short,
        "--ratio",
        "2",
    ]
    refused = xkv(*plain, "What?")
    assert refused.code == 1 and "no chat template" in refused.err and "--template raw" in refused.err
    assert xkv(*plain, "--template", "raw", "What?", "--max-tokens", 2).code == 0


def _without_template(model: Path, target: Path) -> None:
    target.mkdir()
    for path in model.iterdir():
        if path.name != "chat_template.jinja":
            (target / path.name).write_bytes(path.read_bytes())


def test_ambiguous_ids_are_told_apart(xkv: Xkv, artifact: str, store: Path) -> None:
    """A blob of another name is enough: ids are matched before anything is read."""
    twin = store / "prefixes" / artifact[:2] / f"{artifact[:10]}{'0' * 54}.safetensors"
    twin.write_bytes(b"")
    try:
        done = xkv("ask", "--store", store, "--artifact", artifact[:6], "What?")
    finally:
        twin.unlink()
    assert done.code == 1 and f"2 artifacts begin with {artifact[:6]}" in done.err


def test_a_person_in_a_terminal_can_stop_an_answer(artifact: str, store: Path) -> None:
    question, answer = _facts(1)[0]
    with _Terminal("chat", "--artifact", artifact, "--store", store) as terminal:
        terminal.wait_for("/help lists commands")
        terminal.type("/help\n")
        terminal.wait_for("Ctrl-C stops an answer")
        terminal.type("\x03")
        terminal.wait_for("(Ctrl-D or /quit leaves)")
        terminal.type("Repeat the document.\n")
        terminal.wait_for("Repeat the document.\r\n")
        terminal.interrupt()
        terminal.type("/reset\n")
        terminal.wait_for("forgotten")
        terminal.type(f"{question}\n")
        terminal.wait_for(answer)
        terminal.type("\x04")
        assert terminal.process.wait(300) == 0
    assert "Traceback" not in terminal.seen


class _Terminal:
    """A command in a terminal of its own."""

    def __init__(self, *arguments: object) -> None:
        self.seen, self.typed = "", 0
        self.master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "xkv_cli", *map(str, arguments)],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=_take_terminal,
        )
        os.close(slave)
        os.set_blocking(self.master, False)

    def __enter__(self) -> _Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
        os.close(self.master)

    def type(self, text: str) -> None:
        """Type at the prompt: what is typed while a terminal changes its mode is lost."""
        self._wait(lambda: self.seen[self.typed :].endswith("> "), "the prompt")
        self.typed = len(self.seen)
        os.write(self.master, text.encode())

    def interrupt(self) -> None:
        """Ctrl-C, whatever is going on."""
        os.write(self.master, b"\x03")

    def wait_for(self, text: str) -> None:
        """Wait until `text` is shown behind what was typed last."""
        self._wait(lambda: text in self.seen[self.typed :], repr(text))

    def _wait(self, shown: Callable[[], bool], what: str, seconds: float = 300) -> None:
        until = time.monotonic() + seconds
        while not shown():
            assert time.monotonic() < until, f"{what} was not shown:\n{self.seen}"
            try:
                self.seen += os.read(self.master, 65536).decode(errors="replace")
            except OSError:  # nothing to read, or nobody writes any more
                time.sleep(0.05)


def _take_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
