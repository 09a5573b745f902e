"""Write the example corpus: readable documents, and beside them the questions they answer.

    python tools/make_corpus.py

Writes ``examples/corpus/NAME.md`` and ``examples/questions/NAME.questions.jsonl`` (one JSON object a line
with ``question``, ``answer`` and ``kind``). The same seed gives the same files.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from random import Random

from transformers import AutoTokenizer

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from xkv_service.demo import demo_model_path, layout  # noqa: E402
from xkv_service.demo.documents import Document, make_document  # noqa: E402

LENGTHS = (550, 700, 900, 1200, 1500, 1800, 2200, 2600, 3000, 3600, 4200, 5000, 6000, 7800)
QUESTIONS = 40


def main() -> None:
    """Write every document and its questions."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "examples")
    parser.add_argument("--seed", type=int, default=7)
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(demo_model_path())

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False).input_ids)

    for number, tokens in enumerate(LENGTHS):
        rng = Random(f"{arguments.seed}/{number}")
        kind = layout.KINDS[number % len(layout.KINDS)]
        document = make_document(rng, tokens, count, kind)
        while count(document.text) < 0.95 * tokens:
            document = make_document(rng, tokens, count, kind)
        name = write(arguments.out, document, rng, plain=number % 3 == 2)
        print(f"{count(document.text):6,} tokens  {len(document.questions):4} questions  {name}")


def write(folder: Path, document: Document, rng: Random, plain: bool) -> str:
    """Write one document and a sample of its questions; return its file name."""
    title, body = document.text.split("\n", 1)
    words = re.findall(r"[a-z]+", title.lower())
    stem = "-".join(word for word in words if word not in {"of", "the", "to", "from"})
    name = f"{stem}.{'txt' if plain else 'md'}"
    questions = rng.sample(document.questions, min(QUESTIONS, len(document.questions)))
    lines = [{"question": q.question, "answer": q.answer, "kind": q.kind} for q in questions]
    corpus, asked = folder / "corpus", folder / "questions"
    corpus.mkdir(parents=True, exist_ok=True)
    asked.mkdir(parents=True, exist_ok=True)
    (corpus / name).write_text(f"{title}\n{body}\n", encoding="utf-8")
    (asked / f"{stem}.questions.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8"
    )
    return name


if __name__ == "__main__":
    main()
