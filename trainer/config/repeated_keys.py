"""Keys that stand twice in a YAML or JSON file, of which its readers would drop the first."""

from collections.abc import Mapping

import yaml


def repeated_key(text: str, renamed: Mapping[str, str] | None = None) -> str:
    """The first key that is given twice, with both lines; empty if there is none.

    A dotted key counts as one of its section. `renamed` has today's names of former ones.
    """
    lines: dict[str, int] = {}
    entered: set[int] = set()  # an alias leads to a node again
    nodes = [("", yaml.compose(text.replace("\t", " "), yaml.SafeLoader))]  # tabs: JSON has them
    for prefix, node in nodes:
        if id(node) in entered:
            continue
        entered.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            nodes += [(f"{prefix}{number}.", child) for number, child in enumerate(node.value)]
        elif isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                name = f"{prefix}{key.value}"
                name = (renamed or {}).get(name, name)
                line = key.start_mark.line + 1
                if name in lines:
                    first, second = sorted((lines[name], line))
                    return f"`{name}` stands twice (lines {first}, {second}); keep one of them"
                lines[name] = line
                nodes.append((f"{name}.", value))
    return ""
