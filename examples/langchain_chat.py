"""LangChain over a stored prefix: the document in front, `ChatOpenAI` pointed at the server.

xkv precompute --docs examples/corpus --ratio 20
xkv serve
python examples/langchain_chat.py "Do you know the supplier of the eager eagle lamp?"
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import openai
from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI
from pydantic import SecretStr

HERE = Path(__file__).resolve().parent
DOCUMENT = HERE / "corpus" / "guide-cork-ivory-gull-union.md"
QUESTION = "Do you know the supplier of the eager eagle lamp?"


def main() -> None:
    """Stream an answer, then say where its prompt came from."""
    options = _options()
    llm = ChatOpenAI(
        base_url=options.base_url,
        api_key=SecretStr(os.environ.get("XKV_API_KEY", "-")),
        model=options.model,
        temperature=0,
        max_completion_tokens=128,
        stream_usage=True,  # off by default when the base URL is not OpenAI's
    )
    # The document first and the question last: all prompts about it begin with the tokens that are stored.
    chain = ChatPromptTemplate.from_messages([("user", "{document}\n\n{question}")]) | llm
    asked = {"document": options.document.read_bytes().decode("utf-8-sig"), "question": options.question}
    usage = None
    for chunk in chain.stream(asked):
        print(chunk.text, end="", flush=True)
        usage = chunk.usage_metadata or usage
    assert usage is not None
    cached = usage["input_token_details"]["cache_read"]
    print(f"\n{cached} of {usage['input_tokens']} prompt tokens cached")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("question", nargs="?", default=QUESTION)
    parser.add_argument("--document", type=Path, default=DOCUMENT)
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--model", default="model", help="as /v1/models names it")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        main()
    except openai.APIConnectionError as error:
        sys.exit(f"error: no server answers at {error.request.url}\nhint: start one with xkv serve")
