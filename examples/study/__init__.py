"""The reproduction study: a grid of training runs, the statistics over it, and the page about it. Start with `run.py`."""
