#!/usr/bin/env python3
"""Which lines of the drivers no test executes, and whether each of them may stay dark.

The simulator covers the engine; of the drivers only tests with real disks, sockets and an etcd tell. This builds the driver
crates with counters (RocksDB and everything else from outside is not built again), runs every suite of theirs, and compares
the runs of lines that were never executed ("arms") with tests/dark_arms.txt: one that is not there fails.

  tests/driver_coverage.py              build, run, judge
  tests/driver_coverage.py --judge      only judge what was counted last
  tests/driver_coverage.py --write      the same, and write the list: arms that are new come last, without a reason

Needs llvm-profdata and llvm-cov of the compiler's own version: rustup component add llvm-tools.
"""

import collections
import glob
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
LIST = ROOT / "tests/dark_arms.txt"
TARGET = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
COUNTS = TARGET / "driver-coverage"
# The crates whose lines are counted; what they are built of is not.
DRIVERS = ["storage-node", "gateway", "coordinator", "metastore", "telemetry", "cli"]
SUITES = "crossing disk process contract coordinators http client dev".split()
CARGO = ["cargo", "test", "--workspace", "--locked", "--profile", "ci", "--features", "storage-node/kill-points"]


def main():
    if sys.argv[1:] not in ([], ["--judge"], ["--write"]):
        sys.exit(__doc__)
    if not sys.argv[1:]:
        count()
    files = report()
    arms = {path: dark(path, lines) for path, lines in files.items()}
    table(files, arms)
    found = collections.Counter((path, arm) for path, of in arms.items() for arm in of)
    allowed = allowances()
    if sys.argv[1:] == ["--write"]:
        write(found)
        return
    new = found - allowed
    for path, arm in sorted(allowed - found):
        print(f"lit now, strike it from {LIST.name}: {path}: {arm}")
    for (path, arm), times in sorted(new.items()):
        print(f"dark and not in {LIST.name}: {path}: {arm}" + (f"  ({times} times)" if times > 1 else ""))
    sys.exit(1 if new else 0)


def count():
    shutil.rmtree(COUNTS, ignore_errors=True)
    COUNTS.mkdir(parents=True)
    wrapper = COUNTS / "rustc"
    # The flag for workspace crates only, so that no other crate is built again. Counters are kept in a mapped file: a
    # process that is killed has counted, too.
    wrapper.write_text(
        '#!/bin/sh\ncase "$*" in\n'
        '*"--crate-name engine "*|*"--crate-name tests "*) exec "$@" ;;\n'
        '*) exec "$@" -C instrument-coverage -C llvm-args=-runtime-counter-relocation ;;\nesac\n'
    )
    wrapper.chmod(0o755)
    environment = os.environ | {
        "RUSTC_WORKSPACE_WRAPPER": str(wrapper),
        "LLVM_PROFILE_FILE": f"{COUNTS}/%c%m.profraw",
        "CARGO_INCREMENTAL": "0",
    }
    suites = [["--lib", "--bins"]] + [["--test", suite] for suite in SUITES]
    built = CARGO + [word for suite in suites for word in suite] + ["--no-run", "--message-format=json"]
    output = subprocess.run(built, cwd=ROOT, env=environment, stdout=subprocess.PIPE, check=True, text=True).stdout
    messages = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    programs = {message["executable"] for message in messages if message.get("executable")}
    programs = [program for program in programs if pathlib.Path(program).exists()]
    (COUNTS / "programs").write_text("\n".join(sorted(programs)))
    for suite in suites:
        # A test that fails here and not in its own step has only counted less.
        command = CARGO + suite + ["--no-fail-fast"]
        status = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
        print(f"{' '.join(suite)}: {'ok' if status.returncode == 0 else 'FAILED'}", flush=True)


def tool(name):
    """Of the compiler's own version: others can't read what it counted."""
    sysroot = subprocess.run(["rustc", "--print", "sysroot"], capture_output=True, check=True, text=True).stdout.strip()
    found = glob.glob(f"{sysroot}/lib/rustlib/*/bin/{name}")
    if not found:
        sys.exit(f"{name} is missing: rustup component add llvm-tools")
    return found[0]


def report():
    """Executed or not, for each line that can be, of each file of the drivers that is not a test."""
    merged = COUNTS / "all.profdata"
    counted = sorted(glob.glob(f"{COUNTS}/*.profraw"))
    subprocess.run([tool("llvm-profdata"), "merge", "-sparse", "--failure-mode=all", *counted, "-o", str(merged)], check=True)
    programs = (COUNTS / "programs").read_text().split()
    objects = sum((["-object", program] for program in programs[1:]), [programs[0]])
    command = [tool("llvm-cov"), "export", "-format=lcov", f"-instr-profile={merged}", *objects]
    lcov = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True, text=True).stdout
    files, lines = {}, None
    for record in lcov.splitlines():
        kind, _, rest = record.partition(":")
        if kind == "SF":
            path = os.path.relpath(rest, ROOT)
            is_driver = any(path.startswith(f"{name}/src/") for name in DRIVERS)
            lines = files.setdefault(path, {}) if is_driver else None
        elif kind == "DA" and lines is not None:
            number, times = rest.split(",")[:2]
            lines[int(number)] = lines.get(int(number), 0) + int(times)
    return {path: without_tests(path, lines) for path, lines in files.items()}


def without_tests(path, lines):
    text = (ROOT / path).read_text().splitlines()
    tests = next((at for at, line in enumerate(text, 1) if line.startswith("#[cfg(test)]")), len(text) + 1)
    return {number: times for number, times in lines.items() if number < tests}


def dark(path, lines):
    """Runs of lines that no test executed, each by the text of its first one."""
    text = (ROOT / path).read_text().splitlines()
    arms, before = [], 1
    for number in sorted(lines):
        is_dark = lines[number] == 0 and re.search(r"\w", text[number - 1])
        if is_dark and before != 0:
            arms.append(" ".join(text[number - 1].split()))
        if re.search(r"\w", text[number - 1]):
            before = lines[number]
    return arms


def table(files, arms):
    print(f"{'file':<44} {'lines':>6} {'executed':>9} {'dark arms':>10}")
    total = [0, 0, 0]
    for path in sorted(files):
        lines = files[path]
        executed = sum(times > 0 for times in lines.values())
        row = [len(lines), executed, len(arms[path])]
        total = [sum(pair) for pair in zip(total, row)]
        if lines:
            print(f"{path:<44} {row[0]:>6} {100 * executed / row[0]:>8.1f}% {row[2]:>10}")
    print(f"{'all':<44} {total[0]:>6} {100 * total[1] / max(total[0], 1):>8.1f}% {total[2]:>10}")


def allowances():
    """What the list names: `path: text of the first line`, under headings that give the reason."""
    found = collections.Counter()
    for line in LIST.read_text().splitlines() if LIST.exists() else []:
        if line and not line.startswith("#"):
            path, _, arm = line.partition(": ")
            found[path, arm] += 1
    return found


def write(found):
    left, kept = collections.Counter(found), []
    for line in LIST.read_text().splitlines() if LIST.exists() else []:
        path, _, arm = line.partition(": ")
        if not line or line.startswith("#"):
            kept.append(line)
        elif left[path, arm] > 0:
            left[path, arm] -= 1
            kept.append(line)
    new = [f"{path}: {arm}" for path, arm in sorted(left.elements())]
    LIST.write_text("\n".join(kept + new) + "\n")
    print(f"{len(new)} arms added at the end of {LIST}: give each a reason, or a test")


main()
