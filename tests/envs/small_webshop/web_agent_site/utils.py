"""Where the catalogue lies, as WebShop names it; `--data` points elsewhere."""

DEFAULT_FILE_PATH = DEFAULT_ATTR_PATH = HUMAN_ATTR_PATH = "/nowhere/to/be/found.json"
