"""Serves an installed WebShop over HTTP, many episodes at a time over one catalogue.

    python webshop_server.py --webshop /data/WebShop --port 8970        # with the Python that WebShop is installed in

It imports `web_agent_site` from the folder given, loads catalogue, search index and goals once, and plays WebShop's own
`WebAgentTextEnv` for every episode. Only the standard library and Python 3.8 are needed beside WebShop itself, and
nothing of this project is imported. The routes, JSON both ways (`envs/webshop.py` is the client):

    GET  /health                     {"status": "healthy"}
    GET  /metadata                   number of goals and a fingerprint of them, what is open
    GET  /goals?start=0&stop=100     digest and category of each goal
    GET  /oracle?goal=17             the product that the goal was written for, and its options
    POST /reset {"episode_id", "goal"}                           {"observation": {...}, "reward": 0.0, "done": false}
    POST /step {"episode_id", "action": {"command": TEXT}}       the same shape
    POST /close {"episode_id"}                                   {}

An error is a status of 4xx or 5xx with {"error": TEXT}. An episode whose step raised is forgotten.

Why not WebShop's own web site: it draws prices and price limits of the goals from an unseeded generator when it
starts, so that goal 17 of two starts are two goals. Here the generator is seeded first (`--seed`). Its sessions are kept
for ever and go by the goal's number, so that two episodes of one goal share a basket; here each has a session of its own,
removed with the episode. Its search commands for developers (`<r>`, `<a>`, `<c>`, `<q>`) are refused: one of them is random,
one fails, two look into hidden fields.

All of WebShop runs in one thread, in the order of the requests: it was not written for several, and the Java virtual
machine of its search engine prefers one. It writes no logs of episodes and authenticates nobody: it listens on 127.0.0.1
unless told otherwise.
"""

import argparse
import hashlib
import json
import os
import queue
import random
import sys
import threading
import time
import traceback
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

MAX_REQUEST_BYTES = 1 << 20
MAX_GOALS_A_PAGE = 5000
DEVELOPER_TAGS = ("<r>", "<a>", "<c>", "<q>")
MODES = ("text_rich", "text")


class Refused(Exception):
    """A request that cannot be answered: its status and why."""

    def __init__(self, status, reason):
        super().__init__(reason)
        self.status = status


def main():
    options = parse_options()
    announcements = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what WebShop prints while it loads is no announcement
    if options.memory_gb:
        limit_memory(options.memory_gb)
    if options.exit_with_stdin:
        threading.Thread(target=end_with_stdin, daemon=True).start()
    shop = Shop(options)
    worker = Worker()
    server = ShopServer((options.host, options.port), make_handler(shop, worker))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(json.dumps({"port": server.server_address[1], **shop.metadata()}), file=announcements, flush=True)
    worker.run()


def limit_memory(gigabytes):
    """Of the address space. The Java machine reserves its heap, by default a quarter of the host's memory: here of ours."""
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (int(gigabytes * (1 << 30)),) * 2)
    given = os.environ.get("JAVA_TOOL_OPTIONS", "")
    if "-Xmx" not in given:
        os.environ["JAVA_TOOL_OPTIONS"] = f"{given} -Xmx{max(int(gigabytes * 1024 / 4), 64)}m".strip()


def parse_options():
    parser = argparse.ArgumentParser(description="serve an installed WebShop over HTTP")
    parser.add_argument("--webshop", required=True, help="folder that holds web_agent_site")
    parser.add_argument("--data", default="", help="folder of the catalogue's files; default: as WebShop's utils.py says")
    parser.add_argument("--num-products", type=int, default=1000, help="100, 1000, 100000, or 0 for all")
    parser.add_argument("--synthetic-goals", action="store_true", help="goals from attributes, not the human ones")
    parser.add_argument("--observation-mode", choices=MODES, default="text_rich")
    parser.add_argument("--seed", type=int, default=0, help="of prices and price limits that WebShop draws")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0: any free one; it is printed")
    parser.add_argument("--max-episodes", type=int, default=4096, help="open at a time")
    parser.add_argument("--idle-s", type=float, default=3600.0, help="episodes idle for longer make room for new ones")
    parser.add_argument("--memory-gb", type=float, default=0.0, help="address space of this process; 0 for no limit")
    parser.add_argument("--exit-with-stdin", action="store_true", help="end when standard input is closed")
    return parser.parse_args()


def end_with_stdin():
    while sys.stdin.buffer.read(4096):
        pass
    os._exit(0)


class Shop:
    """WebShop behind five calls. Its methods belong to the worker's thread, `metadata` and `check_goal` to any."""

    def __init__(self, options):
        self._options = options
        self._episodes = {}  # by the client's episode id
        self._num_started = 0
        sys.path[0] = os.path.abspath(options.webshop)  # and not this script's folder, which has modules of its own
        if options.data:
            point_at_data(options.data, options.num_products)
        from web_agent_site.engine.engine import parse_action
        from web_agent_site.envs.web_agent_text_env import SimServer, WebAgentTextEnv
        from web_agent_site.utils import DEFAULT_FILE_PATH

        self._parse_action, self._make_env = parse_action, WebAgentTextEnv
        random.seed(options.seed)
        self._server = SimServer(
            "http://127.0.0.1:3000",
            DEFAULT_FILE_PATH,
            num_products=options.num_products or None,
            human_goals=not options.synthetic_goals,
        )
        self._goals = self._server.goals
        if not self._goals:
            raise SystemExit("WebShop loaded no goals; do its instruction files belong to its product file?")
        self._digests = [digest(goal["instruction_text"]) for goal in self._goals]
        self._fingerprint = digest("".join(self._digests))

    def metadata(self):
        return {
            "name": "webshop",
            "num_goals": len(self._goals),
            "fingerprint": self._fingerprint,
            "observation_mode": self._options.observation_mode,
            "num_episodes": len(self._episodes),
            "num_sessions": len(self._server.user_sessions),
        }

    def goals(self, start, stop):
        if not 0 <= start <= stop <= len(self._goals) or stop - start > MAX_GOALS_A_PAGE:
            known = f"there are {len(self._goals)}, {MAX_GOALS_A_PAGE} a page"
            raise Refused(400, f"no goals [{start}, {stop}): {known}")
        listed = [
            {"digest": self._digests[index], "category": str(self._goals[index].get("category", ""))}
            for index in range(start, stop)
        ]
        return {"goals": listed}

    def oracle(self, index):
        goal = self.check_goal(index)
        wanted = goal["goal_options"]
        names = {name: str(value) for name, value in wanted.items()} if isinstance(wanted, dict) else {}
        return {
            "asin": goal["asin"],
            "name": goal["name"],
            "options": list(names.values()) if names else [str(value) for value in wanted],
        }

    def check_goal(self, index):
        if type(index) is not int or not 0 <= index < len(self._goals):
            raise Refused(400, f"no goal {index!r}; there are {len(self._goals)}")
        return self._goals[index]

    def reset(self, episode_id, index):
        self.check_goal(index)
        self.close(episode_id)
        self._make_room()
        self._num_started += 1
        prefix = f"s{self._num_started}-"
        env = self._make_env(
            observation_mode=self._options.observation_mode,
            server=self._server,
            session_prefix=prefix,
        )
        forget_sessions(self._server, prefix)  # the constructor opens one at a random goal
        episode = self._episodes[episode_id] = {"env": env, "prefix": prefix, "used": time.monotonic(), "is_done": False}
        episode["page"], _ = env.reset(session=index)
        return self._answer(episode, accepted=True, digest=self._digests[index])

    def step(self, episode_id, command):
        episode = self._episodes.get(episode_id)
        if episode is None:
            raise Refused(404, f"no episode {episode_id!r}; reset it first (idle ones are forgotten)")
        if episode["is_done"]:
            raise Refused(409, f"episode {episode_id!r} is over")
        episode["used"] = time.monotonic()
        accepted, reward = self._understands(command, episode["actions"]["clickables"]), 0.0
        if accepted:
            try:
                episode["page"], reward, episode["is_done"], _ = episode["env"].step(command)
            except Exception:
                self.close(episode_id)
                raise
        return self._answer(episode, accepted=accepted, reward=float(reward))

    def close(self, episode_id):
        episode = self._episodes.pop(episode_id, None)
        if episode is not None:
            forget_sessions(self._server, episode["prefix"])
        return {}

    def _understands(self, command, clickables):
        """Whether WebShop would do anything; it ignores the rest without a word."""
        name, argument = self._parse_action(command)
        if not argument:
            return False
        argument = argument.lower()
        if name == "search":
            return argument.split(" ")[0] not in DEVELOPER_TAGS
        return name == "click" and argument != "search" and argument in clickables

    def _answer(self, episode, accepted, reward=0.0, **more):
        """What the client sees. A label that WebShop's own grammar cannot click, one with brackets, is not listed."""
        actions = episode["actions"] = episode["env"].get_available_actions()
        clicks = [label for label in actions["clickables"] if self._parse_action(f"click[{label}]") == ("click", label)]
        observation = {
            "text": episode["page"],
            "accepted": accepted,
            "has_search_bar": bool(actions["has_search_bar"]) and not episode["is_done"],
            "clickables": [] if episode["is_done"] else [label for label in clicks if label != "search"],
        }
        observation.update(more)
        return {"observation": observation, "reward": reward, "done": bool(episode["is_done"])}

    def _make_room(self):
        if len(self._episodes) < self._options.max_episodes:
            return
        now = time.monotonic()
        idle = [key for key, episode in self._episodes.items() if now - episode["used"] > self._options.idle_s]
        for key in idle:
            self.close(key)
        if not idle:
            raise Refused(503, f"{len(self._episodes)} episodes are open; --max-episodes allows no more")


def point_at_data(folder, num_products):
    """Make WebShop read another catalogue than the one its utils.py names: the small files for up to 1,000 products."""
    from web_agent_site import utils

    ending = "_1000.json" if 0 < num_products <= 1000 else ".json"
    names = {
        "DEFAULT_FILE_PATH": "items_shuffle" + ending,
        "DEFAULT_ATTR_PATH": "items_ins_v2" + ending,
        "HUMAN_ATTR_PATH": "items_human_ins.json",
    }
    for constant, name in names.items():
        path = os.path.join(os.path.abspath(folder), name)
        if not os.path.isfile(path):
            raise SystemExit(f"{path} is not there; expected {', '.join(names.values())} in --data")
        setattr(utils, constant, path)


def forget_sessions(server, prefix):
    for name in [name for name in server.user_sessions if name.startswith(prefix)]:
        del server.user_sessions[name]


def digest(text):
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16]


class Worker:
    """Runs calls one after the other, in the thread that called `run`."""

    def __init__(self):
        self._calls = queue.Queue()

    def run(self):
        while True:
            function, arguments, answers = self._calls.get()
            try:
                answers.put((200, function(*arguments)))
            except Refused as refusal:
                answers.put((refusal.status, {"error": str(refusal)}))
            except Exception as error:
                traceback.print_exc()
                answers.put((500, {"error": f"WebShop failed: {type(error).__name__}: {error}"}))

    def call(self, function, *arguments):
        answers = queue.Queue()
        self._calls.put((function, arguments, answers))
        return answers.get()


class ShopServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 1024


def make_handler(shop, worker):
    class Handler(BaseHTTPRequestHandler):
        timeout = 60

        def do_GET(self):
            parts = urllib.parse.urlsplit(self.path)
            query = dict(urllib.parse.parse_qsl(parts.query))
            if parts.path == "/health":
                self._send(200, {"status": "healthy"})
            elif parts.path == "/metadata":
                self._send(200, shop.metadata())
            elif parts.path == "/goals":
                self._answer(lambda: worker.call(shop.goals, int(query["start"]), int(query["stop"])))
            elif parts.path == "/oracle":
                self._answer(lambda: worker.call(shop.oracle, int(query["goal"])))
            else:
                self._send(404, {"error": f"no such route: GET {parts.path}"})

        def do_POST(self):
            routes = {"/reset": self._reset, "/step": self._step, "/close": self._close}
            if self.path in routes:
                self._answer(routes[self.path])
            else:
                self._send(404, {"error": f"no such route: POST {self.path}"})

        def _reset(self):
            fields = self._fields()
            return worker.call(shop.reset, text_in(fields, "episode_id"), fields["goal"])

        def _step(self):
            fields = self._fields()
            return worker.call(shop.step, text_in(fields, "episode_id"), text_in(fields["action"], "command"))

        def _close(self):
            return worker.call(shop.close, text_in(self._fields(), "episode_id"))

        def _answer(self, call):
            try:
                status, answer = call()
            except Refused as refusal:
                status, answer = refusal.status, {"error": str(refusal)}
            except (KeyError, TypeError, ValueError) as error:
                status, answer = 400, {"error": f"malformed request: {type(error).__name__}: {error}"}
            self._send(status, answer)

        def _fields(self):
            length = int(self.headers.get("Content-Length", "0"))
            if not 0 <= length <= MAX_REQUEST_BYTES:
                raise Refused(413, f"a request of {length} bytes; {MAX_REQUEST_BYTES} are allowed")
            return json.loads(self.rfile.read(length).decode())

        def _send(self, status, answer):
            body = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format, *arguments):
            """Not a line for every step."""

    return Handler


def text_in(fields, name):
    value = fields[name]
    if not isinstance(value, str):
        raise TypeError(f"{name} must be text")
    return value


if __name__ == "__main__":
    main()
