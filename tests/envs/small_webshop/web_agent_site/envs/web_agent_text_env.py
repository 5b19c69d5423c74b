"""The shop: products, search, sessions, pages and the reward of a purchase."""

import json
import math
import os
import random
import re
import time
from collections import Counter

from web_agent_site import utils
from web_agent_site.engine.engine import parse_action

PAGE_SIZE, MAX_FOUND = 10, 50
TEXTS = ("description", "features")


class SimServer:
    def __init__(self, base_url, file_path, num_products=None, human_goals=True):
        with open(file_path, encoding="utf-8") as file:
            listed = json.load(file)[:num_products]
        with open(utils.HUMAN_ATTR_PATH, encoding="utf-8") as file:
            wishes = json.load(file)
        with open(utils.DEFAULT_ATTR_PATH, encoding="utf-8") as file:
            self._attributes = {asin: entry["attributes"] for asin, entry in json.load(file).items()}
        self.products = {product["asin"]: self._stocked(product) for product in listed}
        self._words = {asin: set(words_of(json.dumps(one["texts"]))) for asin, one in self.products.items()}
        self._counts = Counter(word for words in self._words.values() for word in words)
        self.goals = [self._goal(asin, wish) for asin in self.products for wish in wishes[asin]]
        random.shuffle(self.goals)
        self.user_sessions = {}
        print(len(self.goals), "goals")  # WebShop talks while it loads

    def search(self, query):
        """The products that share words with the query, those with rare ones first."""
        wanted = set(words_of(query))
        scores = {
            asin: sum(math.log(1 + len(self.products) / self._counts[word]) for word in wanted & words)
            for asin, words in self._words.items()
        }
        return sorted((asin for asin in scores if scores[asin]), key=lambda asin: (-scores[asin], asin))[:MAX_FOUND]

    def reward(self, session):
        goal, product = session["goal"], self.products[session["asin"]]
        hits = sum(wanted in product["attributes"] for wanted in goal["attributes"])
        hits += sum(wanted in session["options"].values() for wanted in goal["goal_options"])
        hits += product["price"] <= goal["price_upper"]
        share = hits / (len(goal["attributes"]) + len(goal["goal_options"]) + 1)
        return share if product["query"] == goal["query"] else share / 2

    def _stocked(self, product):
        prices = [float(price) for price in re.findall(r"[\d.]+", product["pricing"])] or [100.0]
        options = {
            name: [entry["value"].strip().replace("/", " | ").lower() for entry in entries]
            for name, entries in product["customization_options"].items()
        }
        texts = [product["name"], product["full_description"], *product["small_description"]]
        price = random.uniform(prices[0], prices[-1])
        attributes = self._attributes[product["asin"]]
        return {**product, "options": options, "texts": texts, "price": price, "attributes": attributes}

    def _goal(self, asin, wish):
        product = self.products[asin]
        limit = 10 * (int(product["price"] / 10) + random.randint(1, 4))
        return {
            "asin": asin,
            "name": product["name"],
            "category": product["category"],
            "query": product["query"],
            "instruction_text": f"{wish['instruction'].rstrip('.')} for less than {limit} dollars",
            "attributes": wish["instruction_attributes"],
            "goal_options": wish["instruction_options"],
            "price_upper": limit,
        }


class WebAgentTextEnv:
    def __init__(self, observation_mode, server, session_prefix):
        self._server, self._prefix, self._mode = server, session_prefix, observation_mode
        self.reset()

    def reset(self, session=None):
        name = self._prefix + (str(session) if session is not None else str(random.random()))
        goal = self._server.goals[random.randrange(len(self._server.goals)) if session is None else session]
        start = {"goal": goal, "page": "search", "number": 1, "found": [], "asin": None, "options": {}}
        self._session = self._server.user_sessions.setdefault(name, start)
        return self._text(), None

    def get_available_actions(self):
        labels = {
            "search": ["search"],
            "results": ["back to search", "next >", *(["< prev"] if self._session["number"] > 1 else []), *self._shown()],
            "product": ["back to search", "< prev", *TEXTS, "buy now", *self._option_labels()],
            "text": ["back to search", "< prev"],
            "done": [],
        }[self._session["page"]]
        return {"has_search_bar": self._session["page"] == "search", "clickables": labels}

    def step(self, command):
        kind, argument = parse_action(command)
        session, argument = self._session, argument.lower()
        if kind == "search":
            misbehave(argument)
            session.update(page="results", number=1, found=self._server.search(argument), options={})
        elif argument == "back to search":
            session.update(page="search", options={})
        elif argument in ("next >", "< prev") and session["page"] == "results":
            session["number"] += 1 if argument == "next >" else -1
        elif argument == "< prev":
            session.update({"page": "product"} if session["page"] == "text" else {"page": "results", "options": {}})
        elif session["page"] == "results":
            session.update(page="product", asin=argument.upper())
        elif argument in TEXTS:
            session["page"] = "text"
        elif argument == "buy now":
            session["page"] = "done"
            return self._text(), self._server.reward(session), True, None
        else:
            options = self._server.products[session["asin"]]["options"]
            session["options"][next(name for name in options if argument in options[name])] = argument
        return self._text(), 0, False, None

    def _shown(self):
        start = (self._session["number"] - 1) * PAGE_SIZE
        return [asin.lower() for asin in self._session["found"][start : start + PAGE_SIZE]]

    def _option_labels(self):
        asin = self._session["asin"]
        return [label for labels in self._server.products[asin]["options"].values() for label in labels] if asin else []

    def _text(self):
        session, products = self._session, self._server.products
        lines = [f"Wish: {session['goal']['instruction_text']}"]
        if session["page"] == "results":
            lines.append(f"Page {session['number']} of what was found")
            shown = [products[asin.upper()] for asin in self._shown()]
            lines += [f"[{one['asin']}] {one['name']} {one['price']:.2f}" for one in shown]
        elif session["page"] in ("product", "text"):
            product = products[session["asin"]]
            lines += product["texts"] if session["page"] == "text" else [product["name"], f"{product['price']:.2f}"]
            lines += [f"{name}: {', '.join(labels)}" for name, labels in product["options"].items()]
            lines.append(f"Chosen: {sorted(session['options'].values())}")
        elif session["page"] == "done":
            lines.append(f"Thank you. Your score is {self._server.reward(session)}")
        return "\n".join(lines) if self._mode == "text_rich" else " [SEP] ".join(lines)


def words_of(text):
    return re.findall(r"\w+", text.lower())


def misbehave(query):
    if query == "raise now":
        raise RuntimeError("the index is gone")
    if query == "hang now":
        time.sleep(60)
    if query == "crash now":
        os._exit(3)
