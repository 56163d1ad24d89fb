#!/usr/bin/env python3
"""How much of the drivers' code one `./test` runs, and which of their error arms it never does.

    driver_coverage.py [--report | --with COMMAND...] [--list]

The simulator has others in the drivers' place (disks, sockets, etcd, the command line), so what handles their errors
is run by real processes only. This runs `./test --drivers`, which is `./test` without the steps that execute no
driver, with the crates below instrumented (`-C instrument-coverage`), and prints the lines covered of each crate and
the error arms that stayed dark. `--report` looks again at what the last run left; `--with COMMAND` runs a command,
such as one `cargo test`, and adds what it executes to that. `--list` prints every dark arm as the list below wants it.

**An error arm** is a place outside of tests where the source says one of these (`ARMS`):
    Err(…) => …            the body of the match arm; so of `if let Err(…) = … {`
    let … = … else {       the body
    Err(…)                 where one is made
    .map_err(|…| …)        the closure; so of `ok_or_else`, `or_else` and `unwrap_or_else`
    .ok_or(…)?             the way out at the `?`; so of `.map_err(name)?`
    warn!( error!( bail!(  the call
    Status::name(          a gRPC status that is made
    Exit::Name             an exit code that is chosen, but `Exit::Done`
An arm within another dark one is not told as well. Any other `?` is no arm: it hands on what an arm elsewhere has made
or takes. Of some arms the compiler counts nothing: closures that are a constant, bodies below `#[async_trait]`; how many
is printed.

**tests/dark_arms.txt** names the arms that may stay dark, each below the reason why, by file, function and line of
text: so they survive whatever moves lines. The run fails if an arm is dark and not named, and if one is named that is
gone or was executed: then it has a test, and is to be struck out. Reasons that begin with "by chance" may hold arms
that some runs execute and others don't.

**How.** RUSTC_WORKSPACE_WRAPPER names this file, so cargo calls it in rustc's place for the crates of the workspace and
for no other: dependencies, RocksDB among them, are not compiled again, and artefacts with and without do not get
into each other's way. Counters live in a file that every process of the same binary maps (`%c`, continuous mode,
`%m`): a process that is ended with SIGKILL leaves what it has counted, and there are as many files as binaries. They lie
in memory (/dev/shm), so that counting writes to no disk on which a test fsyncs.

Needs rustup's component `llvm-tools` (`scripts/setup --coverage`).
"""

import argparse
import bisect
import collections
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

from rust_source import ROOT, Source

CRATES = ["cli", "coordinator", "gateway", "metastore", "proto", "storage-node", "telemetry"]
NAMED = ROOT / "tests" / "dark_arms.txt"
BY_CHANCE = "by chance"
# Counters at an address that is known only at run time: what continuous mode needs on Linux.
INSTRUMENT = ["-Cinstrument-coverage", "-Cllvm-args=-runtime-counter-relocation"]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument("--with", dest="command", nargs=argparse.REMAINDER, help="run this and add what it executes")
    parser.add_argument("--list", action="store_true", help="print every dark arm")
    args = parser.parse_args()
    target = pathlib.Path(os.environ.get("CARGO_TARGET_DIR") or sys.exit("driver_coverage: source scripts/env first"))
    run = Run(target)
    failed = False
    if not args.report:
        failed = run.go(args.command or [str(ROOT / "test"), "--drivers"], anew=not args.command)
    coverage = run.coverage()
    sources = [Arms(path) for path in driver_files()]
    tell_lines(sources, coverage)
    judged = judge(sources, coverage, args.list)
    if failed:
        print("the run itself failed, so this may be too dark")
    sys.exit(0 if judged and not failed else 1)


def wrapper():
    """What cargo calls: `driver_coverage.py rustc --crate-name …`."""
    line = sys.argv[1:]
    crate = line[line.index("--crate-name") + 1] if "--crate-name" in line else None
    if os.environ.get("CARGO_PKG_NAME") in CRATES and crate != "build_script_build":
        line += INSTRUMENT
    os.execvp(line[0], line)


class Run:
    """One run of instrumented code, and the folder that it leaves: counters, and the names of the binaries that counted."""

    def __init__(self, target):
        self.target = target
        self.folder = target / "driver-coverage"
        self.binaries = self.folder / "binaries"
        self.counted = self.folder / "counted.profdata"

    def go(self, command, anew):
        """Whether it failed."""
        if anew:
            shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        memory = "/dev/shm" if os.path.isdir("/dev/shm") else self.folder
        with tempfile.TemporaryDirectory(prefix="driver-coverage-", dir=memory) as counters:
            failed = self.run(command, counters)
            counted = [*pathlib.Path(counters).glob("*.profraw"), *self.folder.glob(self.counted.name)]
            if not counted:
                sys.exit("driver_coverage: nothing was counted: nothing ran")
            merged = self.folder / "merged.profdata"
            subprocess.run([llvm_tools() / "llvm-profdata", "merge", "-o", merged, *counted], check=True)
            merged.rename(self.counted)
        return failed

    def run(self, command, counters):
        environment = dict(os.environ)
        environment["RUSTC_WORKSPACE_WRAPPER"] = str(pathlib.Path(__file__).resolve())
        environment["LLVM_PROFILE_FILE"] = f"{counters}/%m%c.profraw"
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        seen = set()
        for line in process.stdout:
            sys.stdout.buffer.write(line)
            sys.stdout.buffer.flush()
            # As cargo says it: "Running tests/client.rs (/…/ci/deps/client-0123456789abcdef)".
            ran = re.search(rb"^ *Running .* \((/.*)\)$", line)
            if ran:
                seen.add(ran[1].decode())
        failed = process.wait() != 0
        # `cargo test` and `cargo build` may make one each, since tests unite other features of libraries.
        dkc = self.target / "ci" / "dkc"
        linked = [path for path in dkc.parent.glob("deps/dkc-*") if os.access(path, os.X_OK)]
        seen.update(str(path) for path in linked if b"__llvm_covmap" in path.read_bytes())
        # Without it cargo links the plain one again, the next time that it is wanted.
        dkc.unlink(missing_ok=True)
        with open(self.binaries, "a") as file:
            file.writelines(f"{binary}\n" for binary in sorted(seen))
        return failed

    def coverage(self):
        """File -> its segments, as `llvm-cov export` has them: (line, column, count, has count, begins a region, is a gap)."""
        if not self.counted.exists():
            sys.exit(f"driver_coverage: no {self.counted}: nothing ran")
        binaries = [line for line in sorted(set(self.binaries.read_text().split("\n"))) if line and os.path.exists(line)]
        objects = [word for binary in binaries for word in ("-object", binary)]
        line = [llvm_tools() / "llvm-cov", "export", "-skip-functions", f"-instr-profile={self.counted}", *objects[1:]]
        line += [str(ROOT / crate / "src") for crate in CRATES]
        exported = subprocess.run(line, check=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        files = json.loads(exported.stdout)["data"][0]["files"]
        return {pathlib.Path(file["filename"]): [tuple(segment) for segment in file["segments"]] for file in files}


def llvm_tools():
    sysroot = subprocess.run(["rustc", "--print", "sysroot"], check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
    for found in pathlib.Path(sysroot).glob("lib/rustlib/*/bin/llvm-cov"):
        return found.parent
    sys.exit("driver_coverage: no llvm-cov here; run: rustup component add llvm-tools")


def driver_files():
    return [path for crate in CRATES for path in sorted((ROOT / crate / "src").rglob("*.rs"))]


class Arms(Source):
    """A file: which of its lines are tests', which function a place lies in, and where its error arms are.

    Every offset is of bytes, as llvm counts columns.
    """

    # How arms begin; the name of the group says to `span` what they execute.
    ARMS = re.compile(
        r"(?<![\w!])(?:"
        r"(?P<err>Err\()"
        r"|(?P<closure>(?:map_err|ok_or_else|or_else|unwrap_or_else)\((?:move )?\|)"
        r"|(?P<named>(?:map_err|ok_or)\()"
        r"|(?P<macro>(?:warn|error|bail)!\()"
        r"|(?P<status>Status::[a-z_]+\()"
        r"|(?P<exit>Exit::(?!Done\b)[A-Z]\w*)"
        r"|(?P<otherwise>else \{)"
        r")"
    )

    def __init__(self, path):
        super().__init__(path)
        self.functions = self.find_functions()

    def find_functions(self):
        functions = []
        for found in re.finditer(r"\bfn (\w+)", self.code):
            body = re.compile(r"[{;]").search(self.code, found.end())
            if body and body[0] == "{":
                functions.append((found.start(), self.closing(body.start()), found[1]))
        return functions

    def end_of_expression(self, at):
        """Up to the comma, semicolon or closing bracket that ends the expression that begins at `at`."""
        depth = 0
        while at < len(self.code):
            if self.code[at] in "([{":
                depth += 1
            elif self.code[at] in ")]}":
                depth -= 1
                if depth < 0:
                    return at
            elif self.code[at] in ",;" and depth == 0:
                return at
            at += 1
        return at

    def function(self, offset):
        """Its span and its name."""
        return max((around for around in self.functions if around[0] <= offset < around[1]), default=(0, len(self.code), "-"))

    def arms(self):
        """(where its text begins, the span of what it executes) of each error arm."""
        for found in self.ARMS.finditer(self.code):
            if self.is_test(found.start()):
                continue
            span = self.span(found)
            if span is not None:
                yield found.start(), span

    def span(self, found):
        code, start = self.code, found.start()
        match found.lastgroup:
            case "macro" | "status":
                return start, self.closing(found.end() - 1)
            case "exit":
                after = code[found.end() :].lstrip()
                is_pattern = after.startswith(("=>", "|", "if ")) or re.search(r"\buse [^;]*$|[=!]= $|(?:impl|for) $", code[:start][-200:])
                return None if is_pattern else (start, found.end())
            case "otherwise":
                # An `if` has a bracket before its `else`; a `let` must not.
                return None if code[:start].rstrip().endswith("}") else (start, self.closing(found.end() - 1))
            case "closure":
                body = code.index("|", found.end()) + 1
                return body, self.closing(code.index("(", start))
            case "named":
                end = self.closing(found.end() - 1)
                return (end, end + 1) if code[end] == "?" else None
            case "err":
                end = self.closing(found.end() - 1)
                return self.of_pattern(end) or (None if self.in_pattern(start, end) else (start, end))

    def of_pattern(self, end):
        """The body that a pattern `Err(…)` that ends here leads to."""
        code = self.code
        arrow = re.compile(r"(?:[^\n;]*?|\)*\s*(?:\|[^=>]*|if [^{}]*?)?)=>\s*").match(code, end)
        if arrow:
            return arrow.end(), self.end_of_expression(arrow.end())
        if re.compile(r"\)*\s*=\s").match(code, end):
            # `if let`: the body begins at the first curly bracket that is in no other; a struct's can't stand there.
            depth = 0
            for at in range(end, len(code)):
                if code[at] == "{" and depth == 0:
                    return at, self.closing(at)
                if code[at] == ";" and depth == 0:
                    return None
                depth += {"(": 1, "[": 1, ")": -1, "]": -1}.get(code[at], 0)
        return None

    def in_pattern(self, start, end):
        """`matches!(x, Err(…))` and the like: nothing is made there."""
        line_start = self.code.rfind("\n", 0, end)
        return "matches!(" in self.code[line_start:end] or self.code[start:end] in ("Err(_)", "Err(..)")

    def place(self, offset):
        """As llvm has it, both from 1."""
        line = self.line_of(offset)
        return line, offset - self.starts[line - 1] + 1


def count_of(segments, start, end):
    """How often the code of a span was executed: by its first region, or by the one around it. None: there is none."""
    at = bisect.bisect_left(segments, (*start, -1))
    for line, column, count, has_count, begins, gap in segments[at:]:
        if (line, column) >= end:
            break
        if begins and has_count and not gap:
            return count
    if at > 0:
        _, _, count, has_count, _, gap = segments[at - 1]
        if has_count and not gap:
            return count
    return None


def lines_of(segments):
    """Line -> how often it was executed, by llvm's rule: the most of what begins in it or reaches into it."""
    counts = {}
    of_line = collections.defaultdict(list)
    for segment in segments:
        of_line[segment[0]].append(segment)
    wrapped = None
    for line in range(1, segments[-1][0] + 1 if segments else 1):
        here = of_line[line]
        begun = [count for _, _, count, has_count, begins, gap in here if begins and has_count and not gap]
        skipped = bool(here) and here[0][4] and not here[0][3]
        if wrapped is not None and wrapped[3]:
            begun.append(wrapped[2])
        if begun and not skipped:
            counts[line] = max(begun)
        if here:
            wrapped = here[-1]
    return counts


def tell_lines(sources, coverage):
    total, covered = collections.Counter(), collections.Counter()
    for source in sources:
        crate = source.name.split("/")[0]
        for line, count in lines_of(coverage.get(source.path, [])).items():
            if not source.is_test(source.starts[line - 1]):
                total[crate] += 1
                covered[crate] += count > 0
    print("\nlines of the drivers that were executed, without tests:")
    for crate in CRATES:
        print(f"  {crate:14} {covered[crate]:6} of {total[crate]:6}  {100 * covered[crate] / max(total[crate], 1):5.1f} %")
    print(f"  {'all':14} {covered.total():6} of {total.total():6}  {100 * covered.total() / max(total.total(), 1):5.1f} %")


def judge(sources, coverage, list_all):
    """Whether the dark arms are those that the list names."""
    every, dark, unseen = 0, {}, 0
    for source in sources:
        segments = coverage.get(source.path, [])
        ends = -1
        for text_at, (start, end) in source.arms():
            count = count_of(segments, source.place(start), source.place(end))
            function_at, function_ends, function = source.function(text_at)
            if count is None and count_of(segments, source.place(function_at), source.place(function_ends)) is not None:
                unseen += 1
                continue
            every += 1
            if not count:
                if text_at >= ends:
                    line = source.line_of(text_at)
                    text = source.lines[line - 1].strip().encode("latin-1").decode()
                    dark.setdefault((source.name, function, text), set()).add(line)
                ends = max(ends, end)
    found = collections.Counter({arm: len(lines) for arm, lines in dark.items()})
    named, by_chance = read_named()
    unnamed = found - named - by_chance
    gone = named - found
    print(f"\nerror arms: {every}, of them dark: {found.total()}. Of {unseen} more the compiler counts nothing")
    print(f"  named in {NAMED.relative_to(ROOT)}: {named.total()}, and {by_chance.total()} that some runs execute")
    if list_all:
        tell("dark", found, dark)
    if unnamed:
        tell("dark, and not named: give them a test, or name them with a reason", unnamed, dark)
    if gone:
        tell("named, and gone or executed: strike them out", gone, dark)
    return not unnamed and not gone


def tell(what, arms, places):
    print(f"\n{what}:")
    for arm in sorted(arms):
        lines = ", ".join(str(line) for line in sorted(places.get(arm, [])))
        print(f"{' | '.join(arm)}" + (f"    # line {lines}" if lines else ""))


def read_named():
    """The arms of the list, as often as they stand there: (those that are dark in each run, those that some runs execute)."""
    named, by_chance, reason = collections.Counter(), collections.Counter(), ""
    for number, line in enumerate(NAMED.read_text().splitlines() if NAMED.exists() else [], 1):
        if not line.strip() or line.startswith("# "):
            continue
        if line.startswith("== "):
            reason = line[3:]
            continue
        arm = tuple(line.split(" | ", 2))
        if len(arm) != 3 or not reason:
            sys.exit(f"driver_coverage: {NAMED}:{number}: not `file | function | text` below a reason")
        (by_chance if reason.startswith(BY_CHANCE) else named)[arm] += 1
    return named, by_chance


if len(sys.argv) > 1 and pathlib.Path(sys.argv[1]).name.startswith("rustc"):
    wrapper()
else:
    main()
