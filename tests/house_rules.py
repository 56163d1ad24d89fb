#!/usr/bin/env python3
"""Measures the language and the structure of the code, and refuses what CONTRIBUTING.md does not allow.

    house_rules.py [--list RULE]

Each rule has a limit that may only fall (`RULES`). `--list RULE` prints every place that counts:

    dialect       words in comments that are for people, or that no other project uses, per 1,000 words of comments
    subjectless   comments whose first sentence has no subject, in percent
    references    references to a document, a section or a file that is not in the repository
    homonyms      names of types that are defined in more than one file, in percent of all names
    width         lines over 100 columns
    rooms         files that could touch every part of a state machine: only the file that defines it may
    functions     lines of a function, the length that a tenth of them exceeds
    long          functions of 100 lines or more
    cycles        files that import each other in a circle

Production code is `*/src/**/*.rs` without what is compiled for tests only; the crate `tests` counts, too.
`missing_docs`, which every crate denies, counts public items without a comment.
"""

import argparse
import collections
import pathlib
import re
import subprocess
import sys

import import_cycles
from anchors import anchors
from rust_source import ROOT, TOKEN, Source

CRATES = ["engine", "proto", "metastore", "telemetry", "process", "gateway", "storage-node", "coordinator", "cli", "client", "bench", "tests"]

DIALECT = re.compile(
    r"\b(nobody|somebody|whoever|whom|anew|tell|tells|told|telling|hear|hears|heard|hearing|say|says|said|saying|speak|speaks"
    r"|spoke|spoken|speaking|rightly|lately|forgiv\w+|blam\w+|condemn\w+|newcomers?|as good as|without a word|are none|is none)\b",
    re.IGNORECASE,
)
# What a sentence does not begin with if its subject is named.
NO_SUBJECT = re.compile(
    r"(It|Its|They|Their|Them|He|She|His|What|Whatever|Whether|Which|Whichever|Whose|Who|Whoever|Where|How|Why|Of|None|That|Those|And|But|Or|So"
    r"|Nor|Also|Not|Neither|Never|Only|Else|Otherwise|Then|Too|Same|Likewise|Ditto|…)\b"
)
REFERENCE = re.compile(r"DESIGN(?:\.md)? §|\btrap T\d|model-sessions|\bRFC-\d{4}\b|\.\./shared")
# A file of the repository that a page names, by its path or the end of it.
SOURCE_FILE = re.compile(r"`([\w./-]+\.(?:rs|py|sh|proto|c))`")
DOCUMENT = re.compile(r"\b(docs/[\w./-]+\.(?:md|yaml|json))(#[\w-]+)?")
TYPE = re.compile(r"^\s*(?:pub(?:\([^)]*\))?\s+)?(?:struct|enum|trait|union|type)\s+(\w+)", re.MULTILINE)
COLUMNS = 100
# The state machines that consist of parts: the folder, the type that owns the parts, and its files.
MACHINES = {
    "engine/src/node": ("Node", ["mod.rs"]),
    "engine/src/coordinator": ("LeaderState", ["mod.rs", "leader_state.rs"]),
    "engine/src/batcher": ("Batcher", ["mod.rs"]),
}
FUNCTION = re.compile(r"\bfn\s+\w+")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--list", choices=RULES, help="print every place that counts")
    args = parser.parse_args()
    sources = [Source(path) for crate in CRATES for path in sorted((ROOT / crate / "src").rglob("*.rs"))]
    if args.list:
        measure, _ = RULES[args.list]
        print("\n".join(measure(sources)[1]))
        return
    broken = 0
    for rule, (measure, limit) in RULES.items():
        value, places = measure(sources)
        broken += value > limit
        verdict = "ok" if value <= limit else "FAILED"
        print(f"house_rules: {rule}: {value:g} ({len(places)} places), at most {limit:g}: {verdict}")
    if broken:
        print("house_rules: `tests/house_rules.py --list RULE` prints the places; CONTRIBUTING.md explains the rules")
    sys.exit(1 if broken else 0)


def dialect(sources):
    """Words per 1,000 words of comments."""
    words, places = 0, []
    for source in sources:
        for line, text in comments_of(source):
            words += len(re.findall(r"[A-Za-z']+", text))
            places += [f"{source.name}:{line}: {word[0]}: {text[:110]}" for word in DIALECT.finditer(prose(text))]
    return round(1000 * len(places) / max(words, 1), 2), places


def subjectless(sources):
    """Percent of comments."""
    comments = [(source, *comment) for source in sources for comment in comments_of(source)]
    places = [f"{source.name}:{line}: {text[:120]}" for source, line, text in comments if NO_SUBJECT.match(text)]
    return round(100 * len(places) / max(len(comments), 1), 2), places


def references(sources):
    return counted(dead_references(sources))


def width(sources):
    return counted(wide_lines(sources))


def counted(places):
    places = list(places)
    return len(places), places


def comments_of(source):
    """(line, text) of each comment: its lines joined, outside of tests."""
    block, began, last = [], 0, -2
    for found in TOKEN.finditer(source.text):
        if not found["comment"] or source.is_test(found.start()):
            continue
        line = source.line_of(found.start())
        text = re.sub(r"^//[/!]?|^/\*+|\*/$", "", found[0]).strip()
        after_code = source.lines[line - 1][: found.start() - source.starts[line - 1]].strip() != ""
        if line != last + 1 or after_code or not text:
            if block:
                yield began, " ".join(block)
            block, began = [], line
        if text:
            block.append(text)
        last = line
    if block:
        yield began, " ".join(block)


def prose(text):
    """Without names in code and quotations."""
    return re.sub(r"`[^`]*`|\"[^\"]*\"", "", text)


def homonyms(sources):
    """Percent of the names of types."""
    files = collections.defaultdict(set)
    for source in sources:
        for found in TYPE.finditer(source.code):
            indented = source.code[found.start() :].lstrip("\n").startswith(" ")
            if not source.is_test(found.start(1)) and not (indented and "type " in found[0]):
                files[found[1]].add(source.name)
    twice = {name: where for name, where in files.items() if len(where) > 1}
    places = [f"{name}: {', '.join(sorted(where))}" for name, where in sorted(twice.items())]
    return round(100 * len(places) / max(len(files), 1), 2), places


def dead_references(sources):
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout.split("\n")
    others = [ROOT / name for name in tracked if name.endswith((".md", ".rs", ".py", ".sh", ".toml", ".proto", ".yml", ".yaml")) or name == "test"]
    known = {}
    for path in others:
        if path.name == pathlib.Path(__file__).name or not path.exists():
            continue
        text = path.read_text(errors="replace")
        for found in REFERENCE.finditer(text):
            yield f"{path.relative_to(ROOT)}:{text.count(chr(10), 0, found.start()) + 1}: {found[0]}"
        for found in SOURCE_FILE.finditer(text) if path.suffix == ".md" else ():
            if not any(("/" + name).endswith("/" + found[1]) for name in tracked):
                yield f"{path.relative_to(ROOT)}:{text.count(chr(10), 0, found.start()) + 1}: {found[1]} is not there"
        for found in DOCUMENT.finditer(text):
            target = ROOT / found[1]
            if not target.exists():
                yield f"{path.relative_to(ROOT)}: {found[1]} is not there"
            elif found[2] and found[1].endswith(".md"):
                if found[1] not in known:
                    known[found[1]] = anchors(target.read_text())
                if found[2][1:] not in known[found[1]]:
                    yield f"{path.relative_to(ROOT)}: {found[1]} has no {found[2]}"


def wide_lines(sources):
    for source in sources:
        for number, line in enumerate(source.path.read_text().split("\n"), 1):
            if len(line) > COLUMNS:
                yield f"{source.name}:{number}: {len(line)} columns"


def rooms(sources):
    return counted(
        f"{source.name}:{source.line_of(found.start())}: {machine}"
        for folder, (machine, files) in MACHINES.items()
        for source in sources
        if source.name.startswith(folder + "/") and "/tests/" not in source.name
        if source.name.removeprefix(folder + "/") not in files
        for found in re.finditer(rf"\b{machine}\b", source.code)
        if not source.is_test(found.start())
    )


def functions(sources):
    """Lines, at the ninetieth percentile."""
    lengths = sorted(length for length, _ in function_lengths(sources))
    return lengths[len(lengths) * 9 // 10], []


def long(sources):
    return counted(place for length, place in function_lengths(sources) if length >= 100)


def cycles(_):
    return counted(import_cycles.found(CRATES))


def function_lengths(sources):
    for source in sources:
        if source.name.startswith("tests/"):
            continue
        for found in FUNCTION.finditer(source.code):
            opening = body_of(source.code, found.end())
            if opening is not None and not source.is_test(found.start()):
                first, last = source.line_of(found.start()), source.line_of(source.closing(opening) - 1)
                yield last - first + 1, f"{source.name}:{first}: {found[0]}: {last - first + 1} lines"


def body_of(code, start):
    """The offset of the brace that opens a function's body, or None if it has no body."""
    depth = 0
    for found in re.compile(r"[(\[)\]{;]").finditer(code, start):
        depth += {"(": 1, "[": 1, ")": -1, "]": -1}.get(found[0], 0)
        if depth == 0 and found[0] in "{;":
            return found.start() if found[0] == "{" else None
    return None


# What measures it, and the most that it may be.
RULES = {
    "dialect": (dialect, 0),
    "subjectless": (subjectless, 0),
    "references": (references, 0),
    "homonyms": (homonyms, 1.0),
    "width": (width, 0),
    "rooms": (rooms, 0),
    "functions": (functions, 26),
    "long": (long, 0),
    "cycles": (cycles, 0),
}

if __name__ == "__main__":
    main()
