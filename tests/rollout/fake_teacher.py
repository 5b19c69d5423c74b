"""A small SGLang server that scores: log-probabilities that follow from the ids alone, and a cache it tells the truth about.

    with FakeTeacher(tokenizer=tokenizer) as fake:
        teacher = ServerTeacher(lambda: SGLangClient(fake.url), vocab_size=97)
    fake.bodies, fake.paths                                  # what it was asked
    fake.fault = "count"                                     # every score from now on is wrong in this way

Prompts enter its cache when they are answered, so that requests which are under way together share nothing. Faults: count,
ids, no_null, positive, nan, lists, garbage, error_500, refuse_warm. It runs on a thread, since scoring blocks its caller.
"""

import asyncio
import base64
import hashlib
import json
import threading

import numpy as np
from aiohttp import web

from megatron_tcod.rollout.radix import RadixTree

VOCAB = 97


class NoKV:
    def segment(self, start, stop):
        return self


def logits_after(ids):
    """[VOCAB] fp64 of what follows `ids`."""
    seed = int.from_bytes(hashlib.sha256(np.asarray(ids, np.int64).tobytes()).digest()[:8], "big")
    return np.random.default_rng(seed).normal(size=VOCAB, scale=2.0)


def logprobs_after(ids):
    logits = logits_after(ids)
    return logits - np.log(np.exp(logits).sum())


class FakeTeacher:
    def __init__(self, *, tokenizer=None, delay_s=0.0, is_flat=True, has_sessions=True, cache_tokens=1 << 20, longest=4096):
        self.tokenizer, self.delay_s, self.is_flat, self.has_sessions = tokenizer, delay_s, is_flat, has_sessions
        self.cache_tokens, self.longest = cache_tokens, longest
        self.model_path = "/nowhere/teacher"
        self.texts = {}
        """Ids that its tokenizer spells otherwise."""
        self.fault, self.fired = "", []
        self.refuse_longer_than = 10**9
        self.paths, self.bodies, self.sessions = [], [], set()
        self.tokens_now = self.most_tokens = self.most_requests = self.requests_now = 0
        self.computed_tokens = 0
        self._tree = RadixTree()

    def __enter__(self):
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result()
        return self

    def __exit__(self, *_):
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    @property
    def scored(self):
        return [body for body in self.bodies if body["return_logprob"]]

    @property
    def warmed(self):
        return [body for body in self.bodies if not body["return_logprob"]]

    async def _start(self):
        app = web.Application(client_max_size=1 << 30)
        app.router.add_get("/{name}", self._tell)
        app.router.add_post("/{name}", self._do)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"

    async def _tell(self, request):
        names = ["cache_salt", *(["return_flat_raw_top_logprobs_b64"] if self.is_flat else [])]
        schema = {"GenerateReqInput": {"properties": dict.fromkeys(names, {})}}
        return web.json_response(
            {
                "/openapi.json": {"paths": {}, "components": {"schemas": schema}},
                "/model_info": {"model_path": self.model_path},
                "/server_info": {
                    "max_total_num_tokens": self.cache_tokens,
                    "max_req_input_len": self.longest,
                    "enable_session_radix_cache": self.has_sessions,
                },
            }[request.path]
        )

    async def _do(self, request):
        body = await request.json()
        self.paths.append(request.path)
        if request.path == "/open_session":
            self.sessions.add(body["session_id"])
            return web.json_response(body["session_id"])
        if request.path == "/close_session":
            self.sessions.remove(body["session_id"])
            return web.Response()
        if request.path == "/detokenize":
            if self.tokenizer is None:
                return web.json_response({"error": "no tokenizer"}, status=500)
            texts = [self.texts.get(ids[0], self.tokenizer.decode(ids)) for ids in body["tokens"]]
            return web.json_response({"text": texts})
        assert request.path == "/generate", request.path
        return await self._generate(body)

    async def _generate(self, body):
        ids = body["input_ids"]
        self.bodies.append(body)
        if len(ids) > self.refuse_longer_than:
            return web.json_response({"error": "too long"}, status=400)
        matched = self._tree.match(np.array(ids)).length
        self.tokens_now, self.requests_now = self.tokens_now + len(ids), self.requests_now + 1
        self.most_tokens = max(self.most_tokens, self.tokens_now)
        self.most_requests = max(self.most_requests, self.requests_now)
        await asyncio.sleep(self.delay_s)
        self.tokens_now, self.requests_now = self.tokens_now - len(ids), self.requests_now - 1
        start = body["logprob_start_len"]
        cached = min(matched, len(ids) - 1, start if start >= 0 else len(ids))
        self.computed_tokens += len(ids) - cached
        self._tree.insert(np.array(ids), lambda first, last: NoKV())
        meta = {"finish_reason": {"type": "length"}, "prompt_tokens": len(ids), "cached_tokens": cached}
        meta["completion_tokens"] = 0
        if body["return_logprob"]:
            if self.fault == "error_500":
                self.fired.append(self.fault)
                return web.json_response({"error": "out of order"}, status=500)
            meta |= self._scores(ids, start, body)
        elif self.fault == "refuse_warm":
            self.fired.append(self.fault)
            return web.json_response({"error": "no warm-ups today"}, status=400)
        if self.fault == "garbage":
            self.fired.append(self.fault)
            return web.Response(text="<html>proxy</html>", content_type="text/html")
        return web.Response(text=json.dumps({"output_ids": [], "meta_info": meta}), content_type="application/json")

    def _scores(self, ids, start, body):
        rows = [logprobs_after(ids[:n]) for n in range(start + 1, len(ids))]
        # SGLang reports the last id of the vocabulary as 0.
        named = [token if token < VOCAB - 1 else 0 for token in ids[start:]]
        entries = [[None, named[0], None]]
        entries += [[float(row[ids[n]]), named[n - start], None] for n, row in enumerate(rows, start + 1)]
        k = body.get("top_logprobs_num", 0)
        order = [np.argsort(-row)[:k] for row in rows]
        if self.fault not in ("", "garbage", "refuse_warm"):
            self.fired.append(self.fault)
        if self.fault == "count":
            entries.pop()
        if self.fault == "ids":
            entries[-1][1] = (entries[-1][1] + 1) % VOCAB or 1
        if self.fault == "no_null":
            entries = [*entries[1:], entries[-1]]
        if self.fault == "positive":
            entries[-1][0] = 0.5
        if self.fault == "nan":
            entries[-1][0] = float("nan")
        if self.fault == "lists":
            order[-1] = order[-1][:-1]
        meta = {"input_token_logprobs": entries}
        if k and body.get("return_flat_raw_top_logprobs_b64"):
            flat = np.concatenate([row[at] for row, at in zip(rows, order, strict=True)]).astype("<f4")
            meta["input_top_logprobs_val_flat_b64"] = base64.b64encode(flat.tobytes()).decode()
            meta["input_top_logprobs_idx_flat_b64"] = base64.b64encode(np.concatenate(order).astype("<i4").tobytes()).decode()
            meta["input_top_logprobs_null_prefix"] = 1
        elif k:
            lists = [[[float(row[i]), int(i), None] for i in at] for row, at in zip(rows, order, strict=True)]
            meta["input_top_logprobs"] = [None, *lists]
        return meta
