"""Circles of imports between the files of a crate, for tests/house_rules.py.

A module and its submodules are one room, so imports between them do not count. What is compiled for tests only does not
count either.
"""

import re

from rust_source import ROOT, Source

USE = re.compile(r"\buse\s+([^;]+);")
INLINE = re.compile(r"\b(?:crate|super|self)(?:::\w+)+")


def found(crates):
    """A line for each circle."""
    for crate in crates:
        imports = imports_of(crate)
        for circle in circles(imports):
            arrows = [
                f"{name(module)} imports {', '.join(sorted(map(name, imports[module] & circle)))}"
                for module in sorted(circle)
            ]
            yield f"{crate}: {'; '.join(arrows)}"


def name(module):
    return "::".join(module) or "(root)"


def imports_of(crate):
    """For each module of the crate, as a tuple of names, the modules of the crate that it imports."""
    root = ROOT / crate / "src"
    files = {module_of(path.relative_to(root)): path for path in sorted(root.rglob("*.rs"))}
    imports = {module: set() for module in files}
    for module, path in files.items():
        for names in paths(production_code(Source(path))):
            target = resolve(module, names, files)
            if target is not None and not is_within(target, module) and not is_within(module, target):
                imports[module].add(target)
    return imports


def module_of(path):
    names = path.with_suffix("").parts
    return names[:-1] if names[-1] in ("mod", "lib", "main") else names


def production_code(source):
    code = source.code
    for start, end in source.tests:
        code = code[:start] + " " * (end - start) + code[end:]
    return code


def paths(code):
    """Every path of an import or inside the code, as a list of names."""
    for tree in USE.findall(code):
        yield from branches([], tree)
    for path in INLINE.findall(USE.sub("", code)):
        yield path.split("::")


def branches(prefix, tree):
    """The paths of a `use` tree such as `a::{b, c::{d, e}}`."""
    for branch in split(tree):
        head, brace, rest = branch.partition("{")
        names = [part.strip() for part in head.split(" as ")[0].split("::") if part.strip()]
        if brace:
            yield from branches(prefix + names, rest.rpartition("}")[0])
        elif names:
            yield prefix + names


def split(tree):
    """The parts of a list, separated by commas outside of braces."""
    depth, start = 0, 0
    for at, char in enumerate(tree):
        depth += {"{": 1, "}": -1}.get(char, 0)
        if char == "," and depth == 0:
            yield tree[start:at]
            start = at + 1
    yield tree[start:]


def resolve(module, names, files):
    """The module of this crate in which the path ends, or None for another crate."""
    if names[0] == "crate":
        path = names[1:]
    elif names[0] in ("self", "super"):
        up = names.count("super")
        path = [*module[: len(module) - up], *names[max(up, 1) :]]
    elif (*module, names[0]) in files:
        path = [*module, *names]
    else:
        return None
    while path and tuple(path) not in files:
        path = path[:-1]
    return tuple(path) if tuple(path) in files else None


def is_within(module, other):
    return module[: len(other)] == other


def circles(imports):
    """The strongly connected components of more than one module (Tarjan, 1972)."""
    index, low, stack, components = {}, {}, [], []

    def visit(module):
        index[module] = low[module] = len(index)
        stack.append(module)
        for target in imports[module]:
            if target not in index:
                visit(target)
            if target in stack:
                low[module] = min(low[module], low[target])
        if low[module] == index[module]:
            component = frozenset(stack[stack.index(module) :])
            del stack[stack.index(module) :]
            if len(component) > 1:
                components.append(component)

    for module in imports:
        if module not in index:
            visit(module)
    return components
