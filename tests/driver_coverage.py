#!/usr/bin/env python3
"""Measures the coverage of the drivers by one `./test`, and finds error arms that it never executes.

    driver_coverage.py [--report | --with COMMAND...] [--list]

The simulator replaces the drivers (disks, sockets, etcd, the command line), so only real processes run their error
handling. This script runs `./test --drivers`, which is `./test` without the steps that execute no driver, with the
crates below instrumented (`-C instrument-coverage`), and prints the covered lines of each crate and the error arms that
were not executed ("dark"). `--report` prints the result of the last run again; `--with COMMAND` runs a command, such as
one `cargo test`, and adds its coverage to that result. `--list` prints every dark arm in the format of the list below.

**An error arm** is a place outside of tests where the source has one of these (`ARMS`):
    Err(…) => …            the body of the match arm; so of `if let Err(…) = … {`
    let … = … else {       the body
    Err(…)                 where one is made
    .map_err(|…| …)        the closure; so of `ok_or_else`, `or_else` and `unwrap_or_else`
    .ok_or(…)?             the way out at the `?`; so of `.map_err(name)?`
    warn!( error!( bail!(  the call
    Status::name(          a gRPC status that is made
    Exit::Name             an exit code that is chosen (also `CommandExit::`, `ProcessExit::`), except `Done`
An arm within another dark one is not reported. Any other `?` is not an arm: it passes an error on that another arm
creates or handles. The compiler has no counters for some arms: closures that are a constant, bodies below
`#[async_trait]`; their number is printed.

**tests/dark_arms.txt** lists the arms that may stay dark, each below its reason, by file, function and text of the line,
which stay the same when lines move. The run fails if a dark arm is not listed, and if a listed one is gone or was
executed: then it has a test, and must be deleted from the list. Arms below a reason that begins with "by chance" may be
executed by some runs and not by others.

**Method.** RUSTC_WORKSPACE_WRAPPER names this file, so cargo calls it instead of rustc for the crates of the workspace
only: dependencies, RocksDB among them, are not compiled again, and artefacts with and without instrumentation don't
collide. The counters are in a file that every process of the same binary maps (`%c`, continuous mode, `%m`): a process
that is ended with SIGKILL leaves its counts, and there are as many files as binaries. The files are in memory (/dev/shm),
so that counting writes to no disk on which a test fsyncs.

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

CRATES = ["cli", "client", "coordinator", "gateway", "metastore", "process", "proto", "storage-node", "telemetry"]
NAMED = ROOT / "tests" / "dark_arms.txt"
BY_CHANCE = "by chance"
# Continuous mode on Linux needs counters at an address that is known only at run time.
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
        print("the run itself failed, so more arms may be dark than otherwise")
    sys.exit(0 if judged and not failed else 1)


def wrapper():
    """The command that cargo calls: `driver_coverage.py rustc --crate-name …`."""
    line = sys.argv[1:]
    crate = line[line.index("--crate-name") + 1] if "--crate-name" in line else None
    if os.environ.get("CARGO_PKG_NAME") in CRATES and crate != "build_script_build":
        line += INSTRUMENT
    os.execvp(line[0], line)


class Run:
    """One run of instrumented code, and its folder: the counters, and the names of the instrumented binaries."""

    def __init__(self, target):
        self.target = target
        self.folder = target / "driver-coverage"
        self.binaries = self.folder / "binaries"
        self.counted = self.folder / "counted.profdata"

    def go(self, command, anew):
        """Runs the command, and returns whether it failed."""
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
            # The line of cargo: "Running tests/client.rs (/…/ci/deps/client-0123456789abcdef)".
            ran = re.search(rb"^ *Running .* \((/.*)\)$", line)
            if ran:
                seen.add(ran[1].decode())
        failed = process.wait() != 0
        # `cargo test` and `cargo build` may link one each, since tests unite other features of libraries.
        dkc = self.target / "ci" / "dkc"
        linked = [path for path in dkc.parent.glob("deps/dkc-*") if os.access(path, os.X_OK)]
        seen.update(str(path) for path in linked if b"__llvm_covmap" in path.read_bytes())
        # The instrumented binary must not be used as the plain one, which cargo links here again when it builds.
        dkc.unlink(missing_ok=True)
        with open(self.binaries, "a") as file:
            file.writelines(f"{binary}\n" for binary in sorted(seen))
        return failed

    def coverage(self):
        """File -> its segments, in the format of `llvm-cov export`: (line, column, count, has count, begins a region, is a gap)."""
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
    """A file: its test lines, its functions, and its error arms.

    Every offset is of bytes, as llvm counts columns.
    """

    # The beginnings of arms; by the name of the group, `span` finds the code that they execute.
    ARMS = re.compile(
        r"(?<![\w!])(?:"
        r"(?P<err>Err\()"
        r"|(?P<closure>(?:map_err|ok_or_else|or_else|unwrap_or_else)\((?:move )?\|)"
        r"|(?P<named>(?:map_err|ok_or)\()"
        r"|(?P<macro>(?:warn|error|bail)!\()"
        r"|(?P<status>Status::[a-z_]+\()"
        r"|(?P<exit>(?:Command|Process)?Exit::(?!Done\b)[A-Z]\w*)"
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
        """The span and the name of the function around an offset."""
        return max((around for around in self.functions if around[0] <= offset < around[1]), default=(0, len(self.code), "-"))

    def arms(self):
        """(the beginning, the span of the code that it executes) of each error arm."""
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
                # An `if` has a bracket before its `else`; a `let … else` has none.
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
        """Returns whether this is a pattern, as in `matches!(x, Err(…))`, which creates no error."""
        line_start = self.code.rfind("\n", 0, end)
        return "matches!(" in self.code[line_start:end] or self.code[start:end] in ("Err(_)", "Err(..)")

    def place(self, offset):
        """The line and the column, both from 1, as in llvm."""
        line = self.line_of(offset)
        return line, offset - self.starts[line - 1] + 1


def count_of(segments, start, end):
    """The number of executions of a span, by its first region or the one around it; None without a region."""
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
    """Line -> how often it was executed, by llvm's rule: the maximum of the regions that begin in it or extend into it."""
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
    """Returns whether the dark arms are those of the list."""
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
    print(f"\nerror arms: {every}, of them dark: {found.total()}. The compiler has no counters for {unseen} more")
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
    """The arms of the list, with repetitions: (those that are dark in each run, those that some runs execute)."""
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
