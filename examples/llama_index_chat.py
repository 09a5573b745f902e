"""LlamaIndex over a stored prefix: the document in front, `OpenAILike` pointed at the server.

xkv precompute --docs examples/corpus --ratio 20
xkv serve
python -m examples.llama_index_chat "Do you know the supplier of the eager eagle lamp?"
"""

from __future__ import annotations

from llama_index.core.base.llms.types import ChatMessage
from llama_index.llms.openai_like import OpenAILike

from examples.connection import api_key, parse_question, plain_errors


def main() -> None:
    """Stream an answer, then say where its prompt came from."""
    options = parse_question(__doc__)
    llm = OpenAILike(
        api_base=options.base_url,
        api_key=api_key(),
        model=options.model,
        is_chat_model=True,  # /v1/chat/completions
        temperature=0,
        max_tokens=128,
        additional_kwargs={"stream_options": {"include_usage": True}},
    )
    # The document first and the question last: all prompts about it begin with the tokens that are stored.
    message = ChatMessage(role="user", content=f"{options.document}\n\n{options.question}")
    usage = None
    with plain_errors():
        for response in llm.stream_chat([message]):
            print(response.delta, end="", flush=True)
            usage = getattr(response.raw, "usage", None) or usage
    assert usage is not None
    print(f"\n{usage.prompt_tokens_details.cached_tokens} of {usage.prompt_tokens} prompt tokens cached")


if __name__ == "__main__":
    main()
