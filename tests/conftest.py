"""Makes `fakes` importable from every folder of the tests, and `tools` from wherever pytest is started."""

import sys
from pathlib import Path

for folder in (Path(__file__).parent, Path(__file__).parents[1]):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
