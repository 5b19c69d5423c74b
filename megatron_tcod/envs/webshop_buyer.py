"""WebShop's expert: a buyer who knows which product the goal was written for.

    buyer = Buyer(asin="B09XYZ", name="Tarrow handy lantern", options=["olive"])
    action = buyer.act(page)                        # before every turn
    buyer.observe(page, action, accepted=True)      # after it, whoever chose the action

It searches for the product's full name, turns pages, opens the product, clicks the options asked for and buys. It decides
from what can be clicked now and from what was clicked before, so it also finds back from wrong pages.

Searching for the full name is more than the instruction tells: it shows what a good episode looks like, not how to
search. Where several products serve a goal it buys the one that the goal came from.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

BUY, BACK_TO_SEARCH, NEXT_PAGE, PREVIOUS = "buy now", "back to search", "next >", "< prev"
TEXTS = ("description", "features", "reviews", "attributes")
MAX_PAGES = 5
"""WebShop finds 50 products at most, ten a page."""


@dataclass(frozen=True)
class ShopPage:
    """What can be done now. Example: `ShopPage(False, ("back to search", "next >", "b09xyz"))`"""

    has_search_bar: bool = False
    clickables: tuple[str, ...] = ()

    @property
    def is_product(self) -> bool:
        return BUY in self.clickables

    @property
    def is_results(self) -> bool:
        return NEXT_PAGE in self.clickables

    @property
    def commands(self) -> list[str]:
        """As actions; the search has a place for its words."""
        search = ["search[<words>]"] if self.has_search_bar else []
        return search + [f"click[{label}]" for label in self.clickables]


class Buyer:
    """One purchase."""

    def __init__(self, *, asin: str, name: str, options: list[str]) -> None:
        self._asin, self._name, self._options = asin.lower(), name, options
        self._num_exhausted, self._page_number = 0, 1
        self._is_open = False
        self._chosen: set[str] = set()

    def act(self, page: ShopPage) -> str:
        """The next action from this page."""
        if page.has_search_bar:
            return f"search[{self._query()}]"
        if page.is_product:
            return f"click[{self._next_on_product(page)}]"
        if self._asin in page.clickables:
            return f"click[{self._asin}]"
        if page.is_results:
            return f"click[{NEXT_PAGE if self._page_number < MAX_PAGES else BACK_TO_SEARCH}]"
        return f"click[{PREVIOUS if PREVIOUS in page.clickables else BACK_TO_SEARCH}]"

    def observe(self, page: ShopPage, action: str, *, accepted: bool) -> None:
        """Keep track of where an accepted action led from `page`."""
        kind, _, argument = action.partition("[")
        label = argument.removesuffix("]").lower()
        if not accepted:
            return
        if kind == "search":
            self._page_number, self._is_open = 1, False
        elif page.is_results:
            self._num_exhausted += label == BACK_TO_SEARCH and self._page_number >= MAX_PAGES
            self._page_number += (label == NEXT_PAGE) - (label == PREVIOUS)
            self._is_open = label == self._asin
            self._chosen.clear()
        elif page.is_product and label in (PREVIOUS, BACK_TO_SEARCH):
            self._is_open = False
        elif page.is_product and label not in TEXTS:  # an option; it may replace one that was chosen before
            is_wanted = any(label == nearest(option, page.clickables) for option in self._options)
            self._chosen = self._chosen | {label} if is_wanted else set()

    def _query(self) -> str:
        """The full name; where all its pages are exhausted, halves of it. Brackets would end the action."""
        words = self._name.replace("[", " ").replace("]", " ").split()
        half = max(1, len(words) // 2)
        variants = [words, words[:half], words[half:] or words]
        return " ".join(variants[self._num_exhausted % len(variants)])

    def _next_on_product(self, page: ShopPage) -> str:
        if not self._is_open:
            return PREVIOUS if PREVIOUS in page.clickables else BACK_TO_SEARCH
        labels = [nearest(option, page.clickables) for option in self._options]
        return next((label for label in labels if label and label not in self._chosen), BUY)


def nearest(option: str, labels: tuple[str, ...]) -> str:
    """The label for an option as the goal names it; empty where none is like it."""
    near = difflib.get_close_matches(option.lower().replace("/", " | "), labels, 1, cutoff=0.5)
    return near[0] if near else ""
