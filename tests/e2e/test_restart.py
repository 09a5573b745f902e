"""Conversations of `xkv serve` go on after a restart of the server, from the store."""

from __future__ import annotations

import time
from pathlib import Path

import httpx
from command_runs import Xkv
from openai import OpenAI
from served import Server

CORPUS = Path(__file__).parents[2] / "examples" / "corpus"


def test_a_conversation_goes_on_after_a_restart(xkv: Xkv, tmp_path: Path) -> None:
    document = (CORPUS / "bulletin-houston-lucky-dove-society.txt").read_text().strip()
    messages = [{"role": "user", "content": f"{document}\n\nWho is named first?"}]
    held = 0
    for turn in range(2):
        server = Server(tmp_path, "--store", tmp_path / "store", "--stored-tails", "64MiB")
        try:
            client = OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0)
            reply = client.chat.completions.create(
                model=client.models.list().data[0].id, messages=messages, max_tokens=8, temperature=0
            )
            usage = reply.usage
            assert usage is not None and usage.prompt_tokens_details is not None
            cached = usage.prompt_tokens_details.cached_tokens
            assert cached == 0 if turn == 0 else cached >= held, (cached, held)
            held = usage.prompt_tokens
            messages += [
                {"role": "assistant", "content": reply.choices[0].message.content or ""},
                {"role": "user", "content": "And then?"},
            ]
            end = time.monotonic() + 120  # replicas say once a second what they did
            name = "xkv_engine_tails_loaded_total 1.0" if turn else "xkv_engine_tails_none_total 1.0"
            while name not in (metrics := httpx.get(f"{server.url}/metrics").text):
                assert time.monotonic() < end, metrics
                time.sleep(0.5)
            assert "xkv_stored_tail_bytes" in metrics
        finally:
            assert server.stop() == 0, server.log.read_text()
    told = xkv("ls", "--store", tmp_path / "store", "--json").json["stored_tails"]
    assert told["tails"] == 1 and told["bytes"] > 0
    assert "stored tails of conversations: 1 (" in xkv("gc", "--store", tmp_path / "store").out
