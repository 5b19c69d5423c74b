"""A small shop behind the names that `webshop_server.py` imports from WebShop; every line of it is our own.

It reads a catalogue in WebShop's file format and shows pages of text instead of HTML. What makes WebShop hard to serve
is here on purpose: prices and price limits come from the unseeded generator, sessions are kept for ever and by name, and the
constructor of the environment opens one at a random goal. `search[raise now]`, `hang` and `crash` break it.
"""
