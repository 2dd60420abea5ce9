"""A streaming endpoint on Ray Serve: one model a replica, with continuous batching over all requests of the replica.

    pip install '.[ray]'                              # in a checkout of pcg-compile
    serve run examples.ray_serve:app model=Qwen/Qwen3-0.6B replicas=4
    curl -N localhost:8000 -d '{"prompt": "Once upon a time", "max_new_tokens": 50, "temperature": 0.7, "seed": 3}'

A prompt is text or token ids. Each line of the answer is a token and its text; the last one says how many there were.
"""

from __future__ import annotations

import asyncio
import json
import queue
import threading
from collections.abc import AsyncIterator
from itertools import count
from typing import Any

import torch
from ray import serve
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from transformers import AutoModelForCausalLM, AutoTokenizer

from pcg_compile.integrations.generation import Engine, Request, Sampling, Session
from pcg_compile.integrations.generation.engine import attending_through_pcg
from pcg_compile.integrations.transformers import cache_for

GPU = torch.cuda.is_available()


@serve.deployment(max_ongoing_requests=256, ray_actor_options={"num_gpus": int(GPU)})
class Generator:
    """One model. A thread of its own runs the steps; HTTP handlers give it functions to call between two steps."""

    def __init__(self, model: str, length: int = 2048, pages: int = 4096 if GPU else 512) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype="auto").to("cuda" if GPU else "cpu").eval()
        self.length, self.pages, self.names = min(length, 16 * (pages - 1)), pages, count()
        self.inbox, self.outboxes, self.ends = queue.SimpleQueue(), {}, frozenset(self.tokenizer.all_special_ids)
        self.thread = threading.Thread(target=self._generate, daemon=True)
        self.thread.start()

    def _generate(self) -> None:
        options = {"compiler": "inductor" if GPU else "eager"}
        with torch.no_grad(), attending_through_pcg(self.model):
            engine = Engine(self.model, cache_for(self.model, num_pages=self.pages), 256, 2048, options)
            with Session(engine, self.length) as session:
                while True:
                    self.inbox.get()(session)
                    for request, token in session.run():
                        self.outboxes.get(request.id, lambda token: None)(token)
                        if token is None:
                            session.requests.pop(request.id, None)
                        while not self.inbox.empty():
                            self.inbox.get()(session)

    def check_health(self) -> None:
        """Ray replaces a replica that raises here."""
        assert self.thread.is_alive(), "the thread that generates has ended"

    def _request(self, prompt: Any, max_new_tokens: int = 100, seed: int = 0, **sampling: float) -> Request:
        ids = prompt if isinstance(prompt, list) else self.tokenizer(prompt).input_ids
        if not ids or not all(type(i) is int and 0 <= i < self.model.config.vocab_size for i in ids):
            raise ValueError(f"prompt: text, or token ids from 0 to {self.model.config.vocab_size - 1}")
        if not 1 <= max_new_tokens <= self.length - len(ids):
            raise ValueError(f"max_new_tokens: from 1 to {self.length - len(ids)}, the prompt has {len(ids)} tokens")
        settings = Sampling(**{name: float(sampling[name]) for name in sampling}, seed=seed)
        return Request(str(next(self.names)), 0, ids, max_new_tokens, settings, self.ends)

    async def _stream(self, request: Request) -> AsyncIterator[str]:
        loop, events, ids, shown = asyncio.get_running_loop(), asyncio.Queue(), [], 0
        self.outboxes[request.id] = lambda token: loop.call_soon_threadsafe(events.put_nowait, token)
        self.inbox.put(lambda session: session.add(request))
        try:
            while (token := await events.get()) is not None:
                ids.append(token)
                text = self.tokenizer.decode(ids)
                piece = "" if text.endswith("\ufffd") else text[shown:]  # Part of a character waits for the rest.
                shown += len(piece)
                yield json.dumps({"token": token, "text": piece}) + "\n"
            yield json.dumps({"error": str(request.error)} if request.error else {"finished": len(ids)}) + "\n"
        finally:  # A client that hangs up ends its request.
            del self.outboxes[request.id]
            self.inbox.put(lambda session: session.cancel(request.id))

    async def __call__(self, http: HttpRequest) -> Response:
        try:
            request = self._request(**await http.json())
        except (TypeError, ValueError) as error:
            return JSONResponse({"error": str(error)}, status_code=400)
        return StreamingResponse(self._stream(request), media_type="application/x-ndjson")


def app(arguments: dict[str, str]) -> serve.Application:
    """What ``serve run`` starts; the number of replicas follows the requests that are under way."""
    scaling = {"min_replicas": 1, "max_replicas": int(arguments.get("replicas", 1)), "target_ongoing_requests": 64}
    return Generator.options(autoscaling_config=scaling).bind(arguments["model"])
