#!/usr/bin/env python3
"""Runs every command that README.md and docs/*.md show, and compares its output with the one that is shown.

The `sh` and `console` blocks of a document run in order in one shell, as its reader would type them: in a new folder that
has links to the files of the clone, with `dkc` ($DKC_BIN) and `etcd` ($ETCD) on the PATH, until the first command that
fails. Ports on 127.0.0.1 are rewritten to free ones and back. Comments right above a block are instructions for this
script:

    <!-- not run: needs root -->   exempt, for that reason
    <!-- no cluster -->            once in a document that starts its own; others share one `dkc dev` at 127.0.0.1:8080,
                                   so each uses counters of its own
    <!-- printed above -->         above a `text` block: the output of the last command; digits and widths may differ

Commands in sentences and tables are not run, since most lack values or take minutes; each must still be valid: `dkc`
knows the subcommand and every flag (`--help`), a file is in the clone, and a measurement is a step of ./test, or a binary
or example that cargo knows, whose source knows every flag.

In `sh`, comments at column 0 right below a command are its output, in `console` every line without `$ `: line by line,
JSON as JSON, and `…` stands for any text.
"""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from anchors import anchors

REPOSITORY = Path(__file__).resolve().parent.parent
ADDRESS = re.compile(r"\b127\.0\.0\.1:(\d{2,5})\b")
DOCUMENT_SECONDS = 120


class Block:
    """A fenced block: its language, its lines, its first line number, and the comment above it."""

    def __init__(self, language, line, directive):
        self.language, self.line, self.directive, self.lines = language, line, directive, []


class Command:
    """A command, its line number, and the lines that it must print; None if the document shows no output."""

    def __init__(self, text, line):
        self.text, self.line, self.prints, self.looks_like = text, line, None, None


class Problem(Exception):
    pass


def blocks(text):
    found, block, directive = [], None, ""
    for number, line in enumerate(text.splitlines(), 1):
        fence = re.match(r"\s*```(\S*)", line)
        if block is not None:
            if fence:
                block = None
            else:
                block.lines.append(line)
        elif fence:
            block = Block(fence[1], number, directive)
            found.append(block)
            directive = ""
        elif comment := re.fullmatch(r"<!-- (.*) -->", line.strip()):
            directive = comment[1]
        elif line.strip():
            directive = ""
    return found


def is_complete(text):
    """Returns whether a shell would run this text, instead of waiting for another line."""
    if text.endswith("\\"):
        return False
    parsed = subprocess.run(["bash", "-n"], input=text + "\n", capture_output=True, text=True)
    return parsed.returncode == 0 and "here-document" not in parsed.stderr


def commands(block):
    found, begun = [], []
    for number, line in enumerate(block.lines, block.line + 1):
        below_a_command = not begun and found and block.lines[number - block.line - 2].strip()
        if line.startswith("# ") and below_a_command:
            found[-1].prints = (found[-1].prints or []) + [line[2:]]
        elif begun or (line.strip() and not line.startswith("#")):
            begun.append(line)
            if is_complete("\n".join(begun)):
                found.append(Command("\n".join(begun), number - len(begun) + 1))
                begun = []
    if begun:
        raise Problem(f"line {block.line}: the block ends in the middle of a command")
    return found


def dialogue(block):
    """The commands of a `console` block, which follow `$`; all other lines are their output."""
    found = []
    for number, line in enumerate(block.lines, block.line + 1):
        if line.startswith("$ "):
            found.append(Command(line[2:], number))
        elif found and not is_complete(found[-1].text):
            found[-1].text += "\n" + line
        elif found:
            found[-1].prints = (found[-1].prints or []) + [line]
        else:
            raise Problem(f"line {block.line}: a console begins with `$ `")
    return found


SHELL = {"sh": commands, "console": dialogue}


def read(document):
    """The commands of a document, the exempt blocks with their reasons, and whether it starts a cluster of its own."""
    found, exempt, text = [], [], document.read_text()
    for block in blocks(text):
        if block.language in SHELL and block.directive.startswith("not run: "):
            exempt.append((block.line, block.directive.removeprefix("not run: ")))
        elif block.language in SHELL:
            found += SHELL[block.language](block)
        elif block.language in ["", "bash", "shell"]:
            raise Problem(f"line {block.line}: commands belong into `sh` or `console` blocks, and every other block needs a language")
        elif block.directive == "printed above":
            found[-1].looks_like = block.lines
    return found, exempt, "<!-- no cluster -->" in text


def mentioned(text):
    """Commands in sentences and tables, with their lines; `… ARGUMENTS` continues the one before."""
    found, fenced = [], False
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        for span in [] if fenced else re.findall(r"`([^`]+)`", line):
            words = [word for word in span.split() if not re.match(r"[A-Z_]+=", word)]
            if found and words[:1] == ["…"]:
                words = found[-1].text.partition(" -- ")[0].split() + words[1:]
            if words[1:] and words[0] in ["dkc", "cargo"] or words and re.match(r"\./(run|test)$|(tests|scripts)/", words[0]):
                found.append(Command(" ".join(words), number))
    return found


def doubts(command):
    """The reasons why a mentioned command could not be run."""
    words = command.text.split()
    # The arguments after ` -- ` are for the program that cargo runs, or for the roles that `dkc dev` starts.
    before, _, behind = command.text.partition(" -- ")
    flags = re.findall(r"(?<=[ \[])--[\w-]+", behind if words[0] == "cargo" else before)
    if words[0] == "dkc":
        told = subprocess.run([os.environ["DKC_BIN"], words[1], "--help"], capture_output=True, text=True)
        known = told.stdout if told.returncode == 0 else None
    elif words[0] == "cargo":
        known = source(words)
    else:
        path = REPOSITORY / words[0]
        known = "" if path.is_dir() else path.read_text() if path.is_file() else None
        measures = words[0].startswith("tests/") and os.access(path, os.X_OK) and path.is_file()
        if measures and words[0] not in (REPOSITORY / "test").read_text():
            yield "is not a step of ./test"
    if known is None:
        yield "does not exist"
        return
    for flag in flags:
        if not re.search(rf"{flag}\b|\b{flag[2:].replace('-', '_')}\b", known):
            yield f"does not know {flag}"


def source(words):
    """The source of the binary, example or test that `cargo run` or `cargo test` runs."""
    if "-p" not in words:
        return None
    package = REPOSITORY / words[words.index("-p") + 1]
    for flag, folder in [("--bin", "src/bin"), ("--example", "examples"), ("--test", "tests")]:
        if flag in words:
            name = words[words.index(flag) + 1]
            for path in [package / folder / f"{name}.rs", package / folder / name / "main.rs"]:
                if path.is_file():
                    return path.read_text()
            return None
    return ""


class Ports:
    """Maps the ports that documents name to free ones, and back."""

    def __init__(self):
        self.free, self.named = {}, {}

    def rewrite(self, text):
        return ADDRESS.sub(lambda at: f"127.0.0.1:{self.port(at[1])}", text)

    def restore(self, text):
        return ADDRESS.sub(lambda at: f"127.0.0.1:{self.named.get(at[1], at[1])}", text)

    def port(self, named):
        while named not in self.free:
            # The ports are below the range for outgoing connections.
            port = str(random.randrange(20_000, 32_000))
            with contextlib.suppress(OSError), socket.socket() as listener:
                listener.bind(("127.0.0.1", int(port)))
                if port not in self.named:
                    self.free[named], self.named[port] = port, named
        return self.free[named]


def environment(folder, ports):
    """The environment, without variables of dkc except the address, so that the defaults apply as in the documents."""
    tools = folder / "tools"
    tools.mkdir()
    for name, path in [("dkc", os.environ["DKC_BIN"]), ("etcd", os.environ["ETCD"])]:
        (tools / name).symlink_to(path)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("DKC_")}
    url = ports.rewrite("http://127.0.0.1:8080")
    return kept | {"PATH": f"{tools}:{kept['PATH']}", "DKC_URL": url}


@contextlib.contextmanager
def session(*argv, **how):
    """Runs a process in a session of its own, all processes of which are ended."""
    process = subprocess.Popen(argv, start_new_session=True, stdin=subprocess.DEVNULL, **how)
    try:
        yield process
    finally:
        for ending in [signal.SIGTERM, signal.SIGKILL]:
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(process.pid, ending)
                process.wait(15)


@contextlib.contextmanager
def cluster(folder, ports):
    folder.mkdir()
    line = ["dkc", "dev", "--data", "data", "--http", ports.rewrite("127.0.0.1:8080")]
    how = {"cwd": folder, "env": environment(folder, ports), "text": True}
    with open(folder / "stderr", "w") as stderr:
        with session(*line, stdout=subprocess.PIPE, stderr=stderr, **how) as process:
            said = process.stdout.readline()
            if not said.startswith("ready "):
                raise Problem(f"dkc dev printed {said!r}: {(folder / 'stderr').read_text()}")
            yield


def run(found, folder, ports):
    """Runs the commands in one shell. Each has files of its own for its output."""
    clone, printed = folder / "clone", folder / "printed"
    clone.mkdir()
    printed.mkdir()
    for entry in REPOSITORY.iterdir():
        if entry.name != ".git":
            (clone / entry.name).symlink_to(entry)
    script = ["set -e"]
    for at, command in enumerate(found):
        script += [f"exec >{printed}/{at} 2>{printed}/{at}.stderr", ports.rewrite(command.text)]
    script += [f"exec >{printed}/end 2>&1"]
    (folder / "script").write_text("\n".join(script) + "\n")
    with session("bash", folder / "script", cwd=clone, env=environment(folder, ports)) as shell:
        with contextlib.suppress(subprocess.TimeoutExpired):
            shell.wait(DOCUMENT_SECONDS)
        ended = "ran for too long" if shell.poll() is None else f"ended with {shell.poll()}"
    mismatches = []
    for at, command in enumerate(found):
        stdout, stderr = printed / str(at), printed / f"{at}.stderr"
        got = ports.restore(stdout.read_text(errors="replace"))
        following = printed / (str(at + 1) if at + 1 < len(found) else "end")
        if not following.exists():
            return mismatches + [f"line {command.line}: `{command.text}` {ended}:\n{got}{stderr.read_text()}"]
        if not agrees(command, got.splitlines()):
            shown = "\n".join(command.prints or command.looks_like)
            mismatches.append(f"line {command.line}: `{command.text}` printed\n{got}\ninstead of\n{shown}")
    return mismatches


def agrees(command, got):
    if command.looks_like is not None:
        return list(map(shape, got)) == list(map(shape, command.looks_like))
    if command.prints is None:
        return True
    return len(got) == len(command.prints) and all(map(same, command.prints, got))


def shape(line):
    """The line with every number and every gap replaced, for comparison."""
    return re.sub(r"\s+", " ", re.sub(r"\d+(\.\d+)?", "0", line)).strip()


def same(shown, got):
    with contextlib.suppress(ValueError):
        return json.loads(shown) == json.loads(got)
    return re.fullmatch(".*".join(map(re.escape, shown.split("…"))), got) is not None


def dead_links(document):
    """Links to files and headings that are not in the clone, as (line, target)."""
    for number, line in enumerate(document.read_text().splitlines(), 1):
        for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", line)):
            path, _, anchor = target.partition("#")
            file = document.parent / path if path else document
            if "://" not in target and not (file.exists() and (not anchor or anchor in anchors(file.read_text()))):
                yield number, target


def incomplete(reference):
    """Differences between the tables of docs/reference.md and the flags of each role, the metrics and the alerts."""
    parts = dict(re.findall(r"^###? (.*)\n((?:(?!#).*\n)*)", reference, re.M))
    for role, title in [("gateway", "Gateway"), ("storage-node", "Storage node"), ("coordinator", "Coordinator")]:
        told = subprocess.run([os.environ["DKC_BIN"], role, "--help"], capture_output=True, text=True, check=True).stdout
        known = set(re.findall(r"^\s+(?:-\w, )?(--[a-z-]+)", told, re.M)) - {"--help"}
        yield from differences(f"dkc {role}", known, first_cells(parts["All roles"]) | first_cells(parts[title]))
    registered = set()
    for path in REPOSITORY.glob("*/src/metrics.rs"):
        text = path.read_text()
        registered |= set(re.findall(r'(?:register|metric|times)\(\s*(?:\w+,\s*)?"(\w+)"', text))
        registered |= set(re.findall(r'\bas "(\w+)",\s+"', text))
        # The list of those that each shard has.
        registered |= set(re.findall(r'^    \("(\w+)", "', text, re.MULTILINE))
    named = {re.sub("_total$", "", name) for name in re.findall(r"`dkc_(\w+)` \|", parts["Metrics"])}
    yield from differences("metrics", registered, named)
    rules = (REPOSITORY / "deploy/prometheus/rules.yml").read_text()
    yield from differences("alerts", set(re.findall(r"alert: (\w+)", rules)), first_cells(parts["Alerts"]))


def first_cells(text):
    return set(re.findall(r"^\| `([^`]+)` \|", text, re.M))


def differences(what, known, named):
    yield from (f"{what}: {missing} is missing" for missing in sorted(known - named))
    yield from (f"{what}: there is no {unknown}" for unknown in sorted(named - known))


def main():
    began, ran, exempt, failed, mentions = time.monotonic(), 0, 0, 0, 0
    documents = [REPOSITORY / name for name in ["README.md", "ARCHITECTURE.md", "tests/README.md"]]
    documents += sorted((REPOSITORY / "docs").glob("*.md"))
    named = [REPOSITORY / name for name in sys.argv[1:]]
    work = Path(tempfile.mkdtemp(prefix="dkc-docs-"))
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, work, ignore_errors=True)
        shared = None
        for document in named or documents:
            name, found, reasons = document.relative_to(REPOSITORY), [], []
            try:
                found, reasons, alone = read(document)
                if found and not alone and shared is None:
                    shared = Ports()
                    stack.enter_context(cluster(work / "cluster", shared))
                folder = work / str(name).replace("/", "-")
                folder.mkdir()
                problems = run(found, folder, Ports() if alone else shared) if found else []
                problems += [f"line {line}: {target} leads nowhere" for line, target in dead_links(document)]
                if document.name == "reference.md":
                    problems += incomplete(document.read_text())
                named_only = mentioned(document.read_text())
                problems += [f"line {each.line}: `{each.text}`: {why}" for each in named_only for why in doubts(each)]
                mentions += len(named_only)
            except Problem as problem:
                problems = [str(problem)]
            for line, reason in reasons:
                print(f"{name}: line {line}: not run: {reason}")
            for problem in problems:
                print(f"{name}: {problem}")
            shown = sum(1 for command in found if command.prints or command.looks_like)
            print(f"{name}: {len(found)} commands, {shown} of them with their output, {len(problems)} failed")
            ran, exempt, failed = ran + len(found), exempt + len(reasons), failed + len(problems)
    seconds = time.monotonic() - began
    print(f"documents: {ran} commands ran, {mentions} mentioned, {exempt} blocks exempt, {failed} failed, {seconds:.0f} s")
    return 1 if failed or not ran else 0


if __name__ == "__main__":
    sys.exit(main())
