#!/usr/bin/env python3
"""Compares every word's count with the text it was counted from.

    compare_counts.py --url URL --namespace NS --corpus FILE --report REPORT [--uniq FILE]

REPORT is the output of `dkc count --json`. Lines that it lists as unknown may have been counted or not, lines
that it lists as not applied or failed were not, and all others were counted once. So for every distinct word
    known <= count <= known + its occurrences in unknown lines.
Without unknown lines that is equality. --uniq names the output of `sort | uniq -c`, against which this
script's own numbers are checked first. Exits 0 if all hold, 1 if one does not.
"""

import argparse
import base64
import json
import sys
import urllib.request
from collections import Counter

BATCH = 10_000


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--url", required=True)
    parser.add_argument("--namespace", required=True)
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--report", required=True)
    parser.add_argument("--uniq")
    args = parser.parse_args()

    with open(args.report) as file:
        report = json.load(file)
    fates = fates_of_lines(report)
    known, unknown, every = Counter(), Counter(), Counter()
    lines = 0
    with open(args.corpus, "rb") as corpus:
        for number, line in enumerate(corpus, 1):
            lines = number
            word = line.rstrip(b"\n")
            every[word] += 1
            fate = fates.get(number)
            if fate is None:
                known[word] += 1
            elif fate == "unknown":
                unknown[word] += 1
    if args.uniq:
        check_uniq(args.uniq, every)
    if report["lines"] != lines:
        sys.exit(f"the report has {report['lines']} lines, the corpus has {lines}")
    if report["applied"] != sum(known.values()):
        sys.exit(f"the report has {report['applied']} counted lines, its lists leave {sum(known.values())}")

    wrong = 0
    words = sorted(every)
    for start in range(0, len(words), BATCH):
        part = words[start : start + BATCH]
        for word, count in zip(part, get(args.url, args.namespace, part)):
            if not known[word] <= count <= known[word] + unknown[word]:
                wrong += 1
                if wrong <= 20:
                    print(f"WRONG {word!r}: {count}, should be {known[word]} to {known[word] + unknown[word]}")
    total = f"{len(words)} distinct words, {lines} lines, {sum(unknown.values())} of them unknown"
    if wrong:
        sys.exit(f"{wrong} words are wrong of {total}")
    print(f"all counts are right: {total}")


def fates_of_lines(report):
    """Line number -> its outcome, for the lines that are not known to be counted."""
    fates = {}
    for fate in ("unknown", "not_applied", "failed"):
        for span in report[fate]:
            for number in range(span["first_line"], span["last_line"] + 1):
                if number in fates:
                    sys.exit(f"line {number} is listed as {fates[number]} and as {fate}")
                fates[number] = fate
    return fates


def check_uniq(path, every):
    distinct = 0
    with open(path, "rb") as file:
        for line in file:
            count, word = line.rstrip(b"\n").lstrip(b" ").split(b" ", 1)
            distinct += 1
            if every[word] != int(count):
                sys.exit(f"sort | uniq -c has {int(count)} for {word!r}, this script {every[word]}")
    if distinct != len(every):
        sys.exit(f"sort | uniq -c has {distinct} words, this script {len(every)}")


def get(url, namespace, words):
    body = json.dumps({"keys": [key(word) for word in words]}).encode()
    request = urllib.request.Request(
        f"{url}/v1/counters/{namespace}/get",
        data=body,
        headers={"Content-Type": "application/json", "Request-Timeout-Ms": "60000"},
    )
    with urllib.request.urlopen(request, timeout=90) as answer:
        counters = json.load(answer)["counters"]
    if len(counters) != len(words):
        sys.exit(f"requested {len(words)} counters, got {len(counters)}")
    return [counter["value"] for counter in counters]


def key(word):
    try:
        return word.decode()
    except UnicodeDecodeError:
        return {"key_base64": base64.b64encode(word).decode()}


if __name__ == "__main__":
    main()
