"""A small OpenAI-compatible endpoint on a thread, for tests: real HTTP, answers from a function, faults on request.

    with ChatEndpoint(answer) as endpoint:       # answer(messages, body) -> text, or a whole reply as a dict
        client = ChatClient(endpoint.url)
    endpoint.bodies, endpoint.headers            # what it was asked
    endpoint.faults = ["error_500", "ok"]        # of the next requests, then "ok" again; an answer may be a Fault too

`ModelAnswers` answers with a model of a Hugging Face directory through the embedded engine. It keeps the ids of its own
answers, so that a conversation that comes back as text is the one that was sampled.
"""

import asyncio
import json
import threading

from aiohttp import web

from megatron_tcod.envs.household_expert import Expert
from megatron_tcod.rollout.embedded_engine import EmbeddedEngine
from megatron_tcod.rollout.engine import Sampling
from megatron_tcod.rollout.transcript import Transcript


class Fault(str):
    """What an answer may be instead of a text: one of the endpoint's faults."""


class ChatEndpoint:
    def __init__(self, answer, *, models=("tiny",), delay_s=0.0):
        self.answer, self.models, self.delay_s = answer, list(models), delay_s
        self.faults, self.bodies, self.headers, self.paths = [], [], [], []
        self.now = self.most = 0

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

    async def _start(self):
        app = web.Application(client_max_size=1 << 28)
        app.router.add_get("/v1/models", self._list)
        app.router.add_post("/v1/chat/completions", self._complete)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"

    async def _list(self, request):
        return web.json_response({"object": "list", "data": [{"id": name} for name in self.models]})

    async def _complete(self, request):
        body = await request.json()
        self.bodies.append(body)
        self.headers.append(dict(request.headers))
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            await asyncio.sleep(self.delay_s)
            fault = self.faults.pop(0) if self.faults else "ok"
            if fault != "ok":
                return await self._misbehave(fault, request)
            found = self.answer(body["messages"], body)
            found = await found if asyncio.iscoroutine(found) else found
            if isinstance(found, Fault):
                return await self._misbehave(found, request)
            return web.json_response(found if isinstance(found, dict) else reply_of(found))
        finally:
            self.now -= 1

    async def _misbehave(self, fault, request):
        if fault == "hang":
            await asyncio.sleep(60)
        if fault == "cut":
            response = web.StreamResponse(headers={"Content-Length": "1000"})
            await response.prepare(request)
            await response.write(b'{"choices": [')
            request.transport.close()
            return response
        if fault == "vanish":
            request.transport.close()
        told = {
            "garbage": (200, "<html>502</html>"),
            "html_200": (200, "[]"),
            "no_choices": (200, json.dumps({"choices": []})),
            "content_list": (200, json.dumps(reply_of(["a"]))),
            "deep": (200, "[" * 100_000),
            "huge": (200, json.dumps(reply_of("x" * (17 << 20)))),
            "bad_usage": (200, json.dumps(reply_of("look") | {"usage": {"prompt_tokens": "many"}})),
            "too_long": (400, json.dumps({"error": {"message": "maximum context length is 128", "code": 400}})),
            "redirect": (307, ""),
        }
        status, text = told.get(fault) or (int(fault.removeprefix("error_")), json.dumps({"error": {"message": fault}}))
        headers = {"Location": f"{self.url}/elsewhere"} if fault == "redirect" else {}
        if status == 429:
            headers["Retry-After"] = "0.4"
        if status == 401:
            text = f"wrong key {request.headers.get('Authorization')}"
        return web.Response(status=status, text=text, content_type="application/json", headers=headers)


def reply_of(text, *, finish="stop", prompt_tokens=11):
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": 3}
    return {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": finish}], "usage": usage}


class ModelAnswers:
    def __init__(self, model, tokenizer, **limits):
        self._tokenizer = tokenizer
        self._engine = EmbeddedEngine(model.config.to_dict(), vocab_size=tokenizer.vocab_size, **limits)
        self._engine.load_weights(iter(model.state_dict().items()), 0)
        self._completions = {}

    async def __call__(self, messages, body):
        transcript = Transcript(self._tokenizer, history_mode="full", compact_turns=0)
        texts = [message["content"] for message in messages]
        for turn, observation in enumerate(texts[::2]):
            transcript.observe(turn, observation)
            if 2 * turn + 1 < len(texts):
                transcript.answer_sampled(turn, self._completions[tuple(texts[: 2 * turn + 2])], "")
        sampling = Sampling(
            max_new_tokens=body["max_tokens"],
            temperature=body["temperature"],
            top_p=body["top_p"],
            seed=body["seed"],
            stop_token_ids=self._tokenizer.stop_token_ids,
        )
        completion = await self._engine.generate(transcript.ids, sampling)
        text = self._tokenizer.answer_text(completion.token_ids)
        known = self._completions.setdefault((*texts, text), completion)
        assert known.token_ids == completion.token_ids, "two answers of one spelling: draw another model"
        return reply_of(text, finish=completion.finish_reason, prompt_tokens=len(transcript.ids))


def expert_answer(messages, body):
    """The household's expert in the model's place."""
    texts = [message["content"] for message in messages]
    expert = Expert(texts[0])
    for index in range(1, len(texts), 2):
        expert.act()
        expert.observe(texts[index + 1])
    return expert.act()


def one_solves_one_looks():
    """Answers of a model that solves each task the first time and only looks around the second time."""
    seen = set()

    def answer(messages, body):
        texts = [message["content"] for message in messages]
        if "look" in texts or (len(texts) == 1 and texts[0] in seen):
            return "look"
        if len(texts) == 1:
            seen.add(texts[0])
        return expert_answer(messages, body)

    return answer
