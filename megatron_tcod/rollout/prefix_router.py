"""Which of several servers a prompt goes to, so that it meets the prefix that one of them has cached.

    router = PrefixRouter(num_servers=4)
    index = router.choose(prompt_ids, num_in_flight=[3, 0, 1, 7])

It remembers where it sent what and asks no server; a new router after a flush forgets. `prefix.py` plans within one cache.
"""

from __future__ import annotations

import hashlib

import numpy as np

ROUTE_CHUNK = 64
"""Tokens per step of the table that remembers which server computed a prompt."""
SPILL = 8
"""A server may have so many more requests in flight than the idlest before its cached prefixes no longer attract."""


class PrefixRouter:
    """Remembers which server computed which beginning of a prompt, in steps of ROUTE_CHUNK tokens.

    A prompt goes to the server of its longest known beginning where that is at least half of it (a system prompt that all
    share attracts nobody), unless that server is SPILL requests busier than another.
    """

    def __init__(self, num_servers: int) -> None:
        self._num_servers = num_servers
        self._server_of: dict[bytes, int] = {}

    def choose(self, prompt_ids: list[int], num_in_flight: list[int]) -> int:
        if self._num_servers == 1:
            return 0
        ids = np.asarray(prompt_ids, dtype=np.int64)
        digest, digests = hashlib.blake2b(digest_size=16), []
        for start in range(0, len(ids) - ROUTE_CHUNK + 1, ROUTE_CHUNK):
            digest.update(ids[start : start + ROUTE_CHUNK].tobytes())
            digests.append(digest.digest())
        idlest = min(range(self._num_servers), key=num_in_flight.__getitem__)
        known = next((i for i in reversed(range(len(digests))) if digests[i] in self._server_of), -1)
        chosen = idlest
        if 2 * (known + 1) * ROUTE_CHUNK >= len(ids):
            home = self._server_of[digests[known]]
            chosen = home if num_in_flight[home] - num_in_flight[idlest] <= SPILL else idlest
        self._server_of.update(dict.fromkeys(digests, chosen))
        return chosen
