"""A small server that speaks as much of SGLang's protocol as the client uses, and misbehaves on demand.

    server = FaultyServer(); url = await server.start()           # or: async with FaultyServer() as server
    server.faults[prompt_id] = "half_body"                        # prompts that begin with this id
    server.poison[token_id] = "hang"                              # prompts that hold this id anywhere
    server.fired                                                  # faults that happened, in order
    python tests/rollout/sglang_faults.py --port 31000 --config keys.yaml     # as a process: what a launched server is

Its tokens follow from prompt, seed and weight version alone (`expected_ids`), so that a test can tell whether an answer
is right. Faults: error_500, garbage, half_body, hang, death, token_count, logprob_length, stale; `refuse()` closes the port.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys

from aiohttp import web

VOCAB = 97


def expected_ids(prompt: list[int], seed: int, version: str, count: int) -> list[int]:
    return random.Random(f"{prompt}/{seed}/{version}").choices(range(VOCAB), k=count)


def answering(body):
    async def answer(request):
        return web.json_response(body())

    return answer


class FaultyServer:
    def __init__(self, *, api_key="", admin_key="", is_new=True, has_memory_saver=False, has_spans=True) -> None:
        self.faults: dict[int, str] = {}
        self.poison: dict[int, str] = {}
        self.num_faults_left = 10**9
        self.fired: list[str] = []
        self.calls: list[str] = []
        self.most_at_once = 0
        self.delay_s = 0.0
        self.version = "default"
        self.model_path = ""
        self.salts: list[str] = []
        self._at_once = 0
        self._api_key, self._admin_key, self._is_new = api_key, admin_key or api_key, is_new
        self._has_memory_saver, self._has_spans = has_memory_saver, has_spans
        self._runner = self._site = None
        self.port = 0

    async def start(self, port: int = 0) -> str:
        app = web.Application(middlewares=[self._check_key])
        for path, body in {"health": dict, "openapi.json": self._openapi, "server_info": self._info}.items():
            app.router.add_get(f"/{path}", answering(body))
        app.router.add_get("/model_info", answering(lambda: {"weight_version": self.version}))
        app.router.add_post("/generate", self._generate)
        app.router.add_post("/{name}", self._control)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        await self.listen(port)
        return f"http://127.0.0.1:{self.port}"

    async def listen(self, port: int) -> None:
        self._site = web.TCPSite(self._runner, "127.0.0.1", port, reuse_address=True)
        await self._site.start()
        self.port = self._site._server.sockets[0].getsockname()[1]

    async def refuse(self) -> None:
        """Accept no new connections; those that exist live on."""
        self.fired.append("refused")
        await self._site.stop()

    async def stop(self) -> None:
        await self._runner.cleanup()

    async def __aenter__(self) -> FaultyServer:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    @web.middleware
    async def _check_key(self, request, handler):
        is_admin = request.method == "POST" and request.path != "/generate"
        key = self._admin_key if is_admin else self._api_key
        if key and request.path != "/health" and request.headers.get("Authorization") != f"Bearer {key}":
            return web.json_response({"error": "Unauthorized"}, status=401)
        return await handler(request)

    def _openapi(self):
        paths = ["/generate", "/flush_cache"] + (["/begin_weight_update", "/end_weight_update"] if self._is_new else [])
        salt = "cache_salt" if self._is_new else "extra_key"
        schemas = {"GenerateReqInput": {"properties": {"input_ids": {}, salt: {}}}}
        return {"paths": dict.fromkeys(paths, {}), "components": {"schemas": schemas}}

    def _info(self):
        return {
            "device": "cpu",
            "dtype": "float32",
            "tp_size": 1,
            "max_req_input_len": 4096,
            "enable_deterministic_inference": True,
            "enable_memory_saver": self._has_memory_saver,
        }

    async def _control(self, request):
        name = request.match_info["name"]
        body = await request.json() if request.can_read_body else {}
        self.calls.append(name)
        if name == "resume_memory_occupation" and "release_memory_occupation" not in self.calls:
            request.transport.abort()
        if "weight_version" in body:
            self.version, self.model_path = body["weight_version"], body.get("model_path", "")
        if name == "flush_cache":
            return web.Response(text="flushed")
        return web.json_response({"success": True, "message": ""})

    async def _generate(self, request):
        self._at_once += 1
        self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            return await self._answer(request, await request.json())
        finally:
            self._at_once -= 1

    async def _answer(self, request, body):
        prompt, params = body["input_ids"], body["sampling_params"]
        self.salts.append(body.get("cache_salt", body.get("extra_key", "")))
        fault = self.faults.get(prompt[0]) or next((self.poison[token] for token in prompt if token in self.poison), None)
        if fault and self.num_faults_left:
            self.num_faults_left -= 1
            self.fired.append(fault)
        else:
            fault = None
        if fault == "hang":
            await asyncio.sleep(3600)
        await asyncio.sleep(self.delay_s)
        if fault == "error_500":
            return web.Response(status=500, text="scheduler says no")
        if fault == "garbage":
            return web.Response(body=b"<html>\xff\xfe it works </html>")
        answer = self._sound_answer(prompt, params, body)
        if fault == "token_count":
            answer["output_ids"] = answer["output_ids"][:-1]
        if fault == "logprob_length":
            answer["meta_info"]["output_token_logprobs"].pop()
        if fault == "stale":
            answer["meta_info"]["weight_versions"][0]["version"] = "41"
        if fault in ("half_body", "death"):
            return await self._break_off(request, json.dumps(answer).encode(), has_length=fault == "half_body")
        return web.json_response(answer)

    def _sound_answer(self, prompt, params, body):
        ids = expected_ids(prompt, params.get("sampling_seed", 0), self.version, params["max_new_tokens"])
        start = body.get("logprob_start_len", -1)
        inputs = [[None if at == start else -1.0, token, None] for at, token in enumerate(prompt) if 0 <= start <= at]
        return {
            "output_ids": ids,
            "meta_info": {
                "finish_reason": {"type": "length", "length": len(ids)},
                "prompt_tokens": len(prompt),
                "completion_tokens": len(ids),
                "cached_tokens": 0,
                "weight_version": self.version,
                "weight_versions": [{"version": self.version, "start": 0, "end": len(ids)}] if self._has_spans else None,
                "input_token_logprobs": inputs,
                "output_token_logprobs": [[-0.5, token, None] for token in ids],
            },
        }

    @staticmethod
    async def _break_off(request, body, *, has_length):
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        if has_length:
            response.content_length = len(body)
        else:
            response.enable_chunked_encoding()
        await response.prepare(request)
        await response.write(body[: len(body) // 2])
        await asyncio.sleep(0.05)
        request.transport.close()
        return response


async def serve(port: int, keys: dict[str, str]) -> None:
    server = FaultyServer(api_key=keys["api-key"], admin_key=keys["admin-api-key"])
    server.delay_s = 0.3
    await server.start(port)
    await asyncio.sleep(3600)


if __name__ == "__main__":
    arguments = dict(zip(sys.argv[1::2], sys.argv[2::2], strict=False))
    with open(arguments["--config"]) as file:
        found = json.load(file)
    asyncio.run(serve(int(arguments["--port"]), found))
