"""LlamaIndex over a stored prefix: the document in front, `OpenAILike` pointed at the server.

xkv precompute --docs examples/corpus --ratio 20
xkv serve
python examples/llama_index_chat.py "Do you know the supplier of the eager eagle lamp?"
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import openai
from llama_index.core.base.llms.types import ChatMessage
from llama_index.llms.openai_like import OpenAILike

HERE = Path(__file__).resolve().parent
DOCUMENT = HERE / "corpus" / "guide-cork-ivory-gull-union.md"
QUESTION = "Do you know the supplier of the eager eagle lamp?"


def main() -> None:
    """Stream an answer, then say where its prompt came from."""
    options = _options()
    llm = OpenAILike(
        api_base=options.base_url,
        api_key=os.environ.get("XKV_API_KEY", "-"),
        model=options.model,
        is_chat_model=True,  # /v1/chat/completions
        temperature=0,
        max_tokens=128,
        additional_kwargs={"stream_options": {"include_usage": True}},
    )
    # The document first and the question last: all prompts about it begin with the tokens that are stored.
    document = options.document.read_bytes().decode("utf-8-sig")
    message = ChatMessage(role="user", content=f"{document}\n\n{options.question}")
    usage = None
    for response in llm.stream_chat([message]):
        print(response.delta, end="", flush=True)
        usage = getattr(response.raw, "usage", None) or usage
    assert usage is not None
    print(f"\n{usage.prompt_tokens_details.cached_tokens} of {usage.prompt_tokens} prompt tokens cached")


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
