"""LangChain over a stored prefix: the document in front, `ChatOpenAI` pointed at the server.

xkv precompute --docs examples/corpus --ratio 20
xkv serve
python -m examples.langchain_chat "Do you know the supplier of the eager eagle lamp?"
"""

from __future__ import annotations

from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI
from pydantic import SecretStr

from examples.connection import api_key, parse_question, plain_errors


def main() -> None:
    """Stream an answer, then say where its prompt came from."""
    options = parse_question(__doc__)
    llm = ChatOpenAI(
        base_url=options.base_url,
        api_key=SecretStr(api_key()),
        model=options.model,
        temperature=0,
        max_completion_tokens=128,
        stream_usage=True,  # off by default when the base URL is not OpenAI's
    )
    # The document first and the question last: all prompts about it begin with the tokens that are stored.
    chain = ChatPromptTemplate.from_messages([("user", "{document}\n\n{question}")]) | llm
    usage = None
    with plain_errors():
        for chunk in chain.stream({"document": options.document, "question": options.question}):
            print(chunk.text, end="", flush=True)
            usage = chunk.usage_metadata or usage
    assert usage is not None
    cached = usage["input_token_details"]["cache_read"]
    print(f"\n{cached} of {usage['input_tokens']} prompt tokens cached")


if __name__ == "__main__":
    main()
