#!/usr/bin/env python3
"""Checks that a cluster takes keyed requests at full speed for any length of time, without a refusal.

    keyed_load.py [--seconds N] [--shards N] [-- FLAGS]

Three nodes (`dkc dev`, DKC names the binary; FLAGS are the roles'). `dkc bench --keyed` sends single increments, each
with an Idempotency-Key of its own, while `dkc count` counts files one after the other, each of whose batches has one.
At the end no request was refused or failed, every counter of the files is exact, and no node has refused a key. The last
lines are the number of increments of each kind and the used space of the records. Exits 1 if a check fails.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request

from count_under_kills import DKC, processes

# There are so many keys that no batch has one twice, so that `dkc count` can't add lines up.
KEYS = 100_000
LINES = 1_000_000


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--shards", type=int, default=24)
    parser.add_argument("flags", nargs="*", help="flags of the roles")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        line = [DKC, "dev", "--nodes", "3", "--shards", str(args.shards), "--http", "127.0.0.1:0"]
        line += ["--data", os.path.join(folder, "data"), "--", *args.flags]
        dev = subprocess.Popen(line, stdout=subprocess.PIPE, text=True)
        try:
            ready = dev.stdout.readline()
            if not ready.startswith("ready http://"):
                sys.exit("keyed_load: dkc dev did not get ready")
            wrong = run(args, folder, ready.split()[1])
        finally:
            dev.send_signal(signal.SIGTERM)
            dev.wait(60)
    sys.exit("keyed_load: " + "; ".join(wrong) if wrong else 0)


def run(args, folder, url):
    """Runs the load, and returns the failures as texts."""
    words = os.path.join(folder, "words")
    with open(words, "w") as file:
        file.writelines(f"word-{number % KEYS}\n" for number in range(LINES))
    until = time.monotonic() + args.seconds
    line = [DKC, "bench", "--url", url, "--keyed", "--clients", "64", "--seconds", str(args.seconds), "--json"]
    bench = subprocess.Popen(line, stdout=subprocess.PIPE, text=True)
    wrong, files = [], 0
    while time.monotonic() < until and not wrong:
        line = [DKC, "count", "--url", url, "files", words, "--json"]
        count = subprocess.run(line, stdout=subprocess.PIPE, text=True)
        files += 1
        if count.returncode != 0:
            wrong.append(f"dkc count of file {files} ended with {count.returncode}: {count.stdout[:500]}")
    report = json.loads(bench.communicate()[0])
    if bench.returncode != 0:
        wrong.append(f"dkc bench ended with {bench.returncode}: {report}")
    say(f"{report['increments_per_second']:.0f} keyed single increments/s for {args.seconds} s")
    say(f"{files} files of {LINES} lines, {files * LINES / args.seconds:.0f} lines/s in keyed batches")
    return wrong + counts(url, files) + records(os.path.join(folder, "data"))


def counts(url, files):
    want, differ = files * LINES // KEYS, []
    for first in range(0, KEYS, 1000):
        keys = [f"word-{number}" for number in range(first, first + 1000)]
        request = urllib.request.Request(
            f"{url}/v1/counters/files/get",
            json.dumps({"keys": keys}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as answer:
            differ += [counter for counter in json.load(answer)["counters"] if counter["value"] != want]
    return [f"{len(differ)} counters are not {want}, such as {differ[0]}"] if differ else []


def records(data):
    """The used space of the fullest shard that each node leads; a refused key is a failure."""
    wrong = []
    for process in processes(data, "storage-node"):
        with urllib.request.urlopen(f"http://{process['addresses']['metrics']}/metrics") as answer:
            lines = answer.read().decode().splitlines()
        values = {}
        for line in lines:
            if line.startswith("dkc_idempotency_"):
                series, value = line.rsplit(" ", 1)
                values.setdefault(series.split("{")[0], []).append(float(value))
        used, room = max(zip(values["dkc_idempotency_bytes"], values["dkc_idempotency_bytes_max"]))
        kept = sum(values["dkc_idempotency_records"])
        say(f"{process['name']}: leads shards with {kept:.0f} records, the fullest is {100 * used / room:.1f} % full")
        if refused := sum(values["dkc_idempotency_refused_total"]):
            wrong.append(f"{process['name']} has refused {refused:.0f} keys")
    return wrong


def say(text):
    print(text, flush=True)


if __name__ == "__main__":
    main()
