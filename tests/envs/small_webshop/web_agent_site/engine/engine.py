"""The grammar of commands: a name, then an argument in brackets."""

import re


def parse_action(command):
    match = re.match(r"(?P<name>.+)\[(?P<argument>.+)\]", command)
    return (match["name"], match["argument"]) if match else (command, None)
