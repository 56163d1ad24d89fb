#!/usr/bin/env python3
"""Checks that `dkc count` counts the access logs of a web server exactly as Python does.

    count_access_logs.py [--megabytes N] [--seed N]

The script generates the log in nginx's combined format: IPv4 and IPv6, users, quotes, bytes that are not UTF-8, query
strings, empty and broken lines, stray quotes, CRs, keys that are too long. It has parts like those of logrotate: two
members of gzip, bzip2, xz, plain, and the one that is being written, which ends in half a line. All parts are counted on
a cluster of one node (`dkc dev`, DKC names the binary) in each of these ways:

    path     --field 7
    status   --regex '" (\\d{3}) '
    request  --csv --delimiter ' ' --field 6

The newest part is counted with --resume-id, first as it is and then complete: its last line must count once, and as a whole.
Exits 0 if every counter, and the numbers of lines that were skipped or failed, are those of Python.
"""

import argparse
import bz2
import csv
import gzip
import io
import json
import lzma
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter

from compare_counts import BATCH, get
from one_gateway import DKC, one_gateway

KEY_BYTES_MAX = 1024
POOL_LINES = 20_000
CHUNK_LINES = 50_000
STATUS = re.compile(rb'" (\d{3}) ')
csv.field_size_limit(1 << 24)


def pool(dice):
    """The lines to choose from: each shape of line with many contents."""
    return [line(dice, number) for number in range(POOL_LINES)]


def line(dice, number):
    address = dice.choice([f"10.{dice.randrange(256)}.0.{dice.randrange(256)}", f"2001:db8::{dice.randrange(65536):x}", "::1"])
    user = dice.choice(["-", "-", "-", "alice", "bob"])
    method = dice.choice(["GET", "GET", "GET", "POST", "HEAD"])
    path = f"/{dice.choice(['', 'shop/', 'api/v1/', 'käse/'])}{int(dice.paretovariate(0.7)) % 50_000}"
    path += dice.choice(["", "", "?q=a%20b&c=1", "?utm=x,y", ";jsessionid=1"])
    agent = dice.choice(["curl/8.5.0", "Mozilla/5.0 (X11; Linux x86_64) Gecko, like", "a \\x22quoted\\x22 bot", "-"])
    referer = dice.choice(["-", "https://a.example/?x=1, y", "https://b.example/\"stray"])
    status, size = dice.choice([200, 200, 200, 204, 301, 404, 500]), dice.randrange(100_000)
    when = f"29/Nov/2026:{dice.randrange(24):02}:{dice.randrange(60):02}:{dice.randrange(60):02} +0000"
    text = f'{address} - {user} [{when}] "{method} {path} HTTP/1.1" {status} {size} "{referer}" "{agent}"'
    whole = text.encode()
    shape = number % 200
    if shape == 0:
        return b"\n"
    if shape == 1:  # A crash in the middle of a line.
        return whole[: dice.randrange(len(whole))] + b"\n"
    if shape == 2:  # Bytes of a client, as nginx with escape=none writes them.
        return whole.replace(b"/", b"/\xe9\xff", 1) + b"\n"
    if shape == 3:
        return whole.replace(b" HTTP", b"/" + b"x" * KEY_BYTES_MAX + b" HTTP") + b"\n"
    if shape == 4:
        return b"\x16\x03\x01 is no request\n"
    if shape < 10:
        return whole + b"\r\n"
    return whole + b"\n"


# This line closes any open quote.
LAST = b'x" y\n'


def write_part(file, lines, size, dice):
    """Writes at least `size` bytes of lines."""
    written = 0
    while written < size:
        chunk = b"".join(dice.choices(lines, k=min(CHUNK_LINES, (size - written) // 150 + 1)))
        written += file.write(chunk)
    file.write(LAST)


def make_parts(folder, megabytes, dice):
    """The path of each part, the oldest first, with Python's function to open it."""
    lines, size = pool(dice), megabytes * 1_000_000 // 5
    parts = []

    def part(name, opening):
        path = os.path.join(folder, name)
        with opening(path, "wb") as file:
            write_part(file, lines, size, dice)
        parts.append((path, opening))
        return path

    two_members = part("access.log.4.gz", lambda path, mode: gzip.open(path, mode, 1))
    with gzip.open(two_members, "ab", 1) as file:
        file.write(lines[7] + LAST)
    parts[-1] = (two_members, gzip.open)
    part("access.log.3.bz2", bz2.open)
    part("access.log.2", lambda path, mode: lzma.open(path, mode, preset=0) if "w" in mode else lzma.open(path, mode))
    part("access.log.1", open)
    part("access.log", open)
    return parts


class Expected:
    """The counts of Python, by the rules of `dkc count`."""

    def __init__(self):
        self.counts, self.lines, self.skipped, self.failed = Counter(), 0, 0, 0

    def add(self, key):
        self.lines += 1
        if not key:
            self.skipped += 1
        elif len(key) > KEY_BYTES_MAX:
            self.failed += 1
        else:
            self.counts[key] += 1


def without_end(line):
    line = line.removesuffix(b"\n")
    return line.removesuffix(b"\r")


def paths(file, expected):
    for line in file:
        fields = line.split()
        expected.add(fields[6] if len(fields) > 6 else b"")


def statuses(file, expected):
    for line in file:
        found = STATUS.search(without_end(line))
        expected.add(found[1] if found else b"")


def requests(file, expected):
    # Latin-1 has a character for each byte, so nothing is lost.
    text = io.TextIOWrapper(file, encoding="latin-1", newline="\n")
    for record in csv.reader(text, delimiter=" "):
        expected.add(record[5].encode("latin-1") if len(record) > 5 else b"")


WAYS = {
    "path": (["--field", "7"], paths),
    "status": (["--regex", r'" (\d{3}) '], statuses),
    "request": (["--csv", "--delimiter", " ", "--field", "6"], requests),
}


def count(url, namespace, path, options, code):
    """Runs `dkc count`, which must end with `code`, and returns its report."""
    line = [DKC, "count", namespace, path, "--url", url, "--json", *options]
    done = subprocess.run(line, capture_output=True, text=True)
    if done.returncode != code:
        sys.exit(f"{' '.join(line)} ended with {done.returncode}, not {code}: {done.stdout[:2000]}{done.stderr[:2000]}")
    return json.loads(done.stdout)


def lines_in(ranges):
    return sum(span["last_line"] - span["first_line"] + 1 for span in ranges)


def check_way(url, folder, name, parts):
    options, reading = WAYS[name]
    expected, reports, began = Expected(), [], time.monotonic()
    for path, opening in parts:
        before = expected.failed
        with opening(path, "rb") as file:
            reading(file, expected)
        code = 1 if expected.failed > before else 0
        if path != parts[-1][0]:
            reports.append(count(url, name, path, options, code))
        else:
            reports.append(count_live(url, folder, name, path, options, code))
    seconds = sum(report["seconds"] for report in reports)
    got = [sum(report[what] for report in reports) for what in ("lines", "skipped", "applied")]
    got.append(sum(lines_in(report["failed"]) for report in reports))
    want = [expected.lines, expected.skipped, sum(expected.counts.values()), expected.failed]
    if got != want:
        sys.exit(f"{name}: lines, skipped, applied, failed are {got}, should be {want}")
    compare(url, name, expected.counts)
    rate = sum(report["lines"] for report in reports) / seconds
    say(f"{name}: {want[0]} lines, {len(expected.counts)} counters right, {want[1]} skipped, {want[3]} failed; "
        f"{rate:.0f} lines/s, {time.monotonic() - began:.0f} s with Python")


def count_live(url, folder, name, path, options, code):
    """Counts the part that is being written: while its last line is incomplete, and when it is complete."""
    options = [*options, "--resume-id", name, "--resume-dir", os.path.join(folder, "state")]
    with open(path, "rb") as file:
        whole = file.read()
    # The cut is in a line that is not one of LAST, so that open quotes are the same as for Python.
    cut = whole.rindex(b"\n", 0, len(whole) - len(LAST) - 1) + 4
    with open(path, "wb") as file:
        file.write(whole[:cut])
    half = count(url, name, path, options, code)
    if half["bytes_left"] == 0:
        sys.exit(f"{name}: the incomplete line was not left out: {half}")
    with open(path, "ab") as file:
        file.write(whole[cut:])
    report = count(url, name, path, options, code)
    if report["resumed"] != half["lines"]:
        sys.exit(f"{name}: {half['lines']} lines were counted first, {report['resumed']} were resumed")
    return report


def compare(url, namespace, counts):
    keys, wrong = sorted(counts), 0
    for start in range(0, len(keys), BATCH):
        part = keys[start : start + BATCH]
        for key, value in zip(part, get(url, namespace, part)):
            if value != counts[key]:
                wrong += 1
                if wrong <= 20:
                    print(f"WRONG {namespace} {key!r}: {value}, should be {counts[key]}")
    if wrong:
        sys.exit(f"{namespace}: {wrong} of {len(keys)} counters are wrong")


BEGUN = time.monotonic()


def say(text):
    print(f"{time.monotonic() - BEGUN:6.1f} s: {text}", flush=True)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--megabytes", type=int, default=10, help="of all parts, decompressed")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        parts = make_parts(folder, args.megabytes, random.Random(args.seed))
        say(f"{args.megabytes} MB of log in {len(parts)} parts")
        with one_gateway("count_access_logs") as gateway:
            for name in WAYS:
                check_way(f"http://{gateway.host}:{gateway.port}", folder, name, parts)
    say("all counters are right")


main()
