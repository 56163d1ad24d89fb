#!/usr/bin/env python3
"""Runs `dkc count words` and kills the processes of the cluster meanwhile, one after the other.

    count_under_kills.py --folder DIR --replicas N [--gateway]

DIR holds `data` (of a running `dkc dev`) and `words` (the corpus); the count's report goes to DIR/report.
Each storage node, then each coordinator, is killed with SIGKILL by its pid in cluster.json, started again
by its argv after a few seconds, and the next is killed once `dkc status --json` shows every in-sync set
full again. With --gateway the second gateway is killed too.

The kills must happen during the count. The first one comes at full speed (with --gateway it is that of the
gateway, which must have requests in flight, or none would have to be sent again); from then on the input is
paced by PACE, so that the last kill is over before the last line is read. Exits 0 if the count ended as
expected, else 1 with the reason.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time

DKC = os.environ.get("DKC", "dkc")
DOWN_SECONDS = float(os.environ.get("DOWN_SECONDS", "3"))
FULL_WITHIN = 120
# Lines per second during the kills, so that every kill hits a busy count.
PACE = int(os.environ.get("PACE", "50000"))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", required=True)
    parser.add_argument("--replicas", type=int, required=True)
    parser.add_argument("--gateway", action="store_true")
    args = parser.parse_args()
    data = os.path.join(args.folder, "data")
    gateways = ["http://" + p["addresses"]["http"] for p in processes(data, "gateway")]
    url = ",".join(gateways)
    victims = processes(data, "storage-node") + processes(data, "coordinator")
    wait_until_full(url, args.replicas)

    with open(os.path.join(args.folder, "report"), "wb") as report:
        count = subprocess.Popen(
            [DKC, "count", "words", "-", "--url", url, "--json", "--batch", "1000"],
            stdin=subprocess.PIPE,
            stdout=report,
        )
    feeder = Feeder(os.path.join(args.folder, "words"), count.stdin)
    feeder.start()
    # More than fits into the pipe and the count's queue: requests are in flight from here on.
    feeder.wait_for(100_000)
    try:
        if args.gateway:
            kill_and_restart(data, processes(data, "gateway")[1], feeder)
        for victim in victims:
            kill_and_restart(data, victim, feeder)
            wait_until_full(url, args.replicas)
        say(f"all in-sync sets are full again after {feeder.given} lines, the rest follows at full speed")
    finally:
        feeder.free()
    code = count.wait()
    feeder.join()
    # The death of a gateway leaves nothing unknown, since each request is sent again under its token.
    if code != 0:
        with open(os.path.join(args.folder, "report")) as report:
            print(report.read()[:2000], file=sys.stderr)
        sys.exit(f"dkc count ended with {code}, not 0")
    if feeder.given_at_last_kill >= feeder.total:
        sys.exit("the input was used up before the last kill: use more LINES or a smaller PACE")
    say(f"dkc count ended with {code} after {len(victims) + args.gateway} kills")


class Feeder(threading.Thread):
    """Writes the corpus to the count: at full speed, but paced from the first kill to the last."""

    def __init__(self, path, pipe):
        super().__init__(daemon=True)
        self.path, self.pipe = path, pipe
        self.given, self.total, self.given_at_last_kill = 0, 0, 0
        self.paced_from = None  # (lines given, time) at the first kill
        self.freed = threading.Event()
        with open(path, "rb") as file:
            self.total = sum(1 for _ in file)

    def run(self):
        try:
            with open(self.path, "rb") as file:
                # The pace is even, without bursts, so that some line is always in flight.
                while lines := file.readlines(64 << 10 if self.paced_from is None else 2 << 10):
                    self.pipe.write(b"".join(lines))
                    self.given += len(lines)
                    if self.paced_from is None:
                        continue
                    lines_then, begun = self.paced_from
                    ahead = (self.given - lines_then) / PACE - (time.monotonic() - begun)
                    if ahead > 0:
                        self.freed.wait(ahead)
            self.pipe.close()
        except BrokenPipeError:
            pass  # The count ended early; its exit code shows the reason.

    def wait_for(self, lines):
        while self.given < min(lines, self.total) and self.is_alive():
            time.sleep(0.01)

    def note_kill(self):
        self.given_at_last_kill = self.given
        self.paced_from = self.paced_from or (self.given, time.monotonic())

    def free(self):
        self.freed.set()


BEGUN = time.monotonic()


def say(text):
    print(f"{time.monotonic() - BEGUN:6.1f} s: {text}", flush=True)


def kill_and_restart(data, victim, load):
    """Kills a process and starts it again. `load` runs meanwhile: `given` is its progress, `note_kill` is called at the kill."""
    # The pid may have changed.
    pid = next(p["pid"] for p in processes(data, victim["role"]) if p["name"] == victim["name"])
    os.kill(pid, signal.SIGKILL)
    load.note_kill()
    say(f"killed {victim['name']} (pid {pid}) after {load.given} increments")
    time.sleep(DOWN_SECONDS)
    log = open(os.path.join(data, "logs", victim["name"] + ".log"), "ab")
    # `dkc dev` adopts the process, and stops it at the end.
    subprocess.Popen(victim["argv"], stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    deadline = time.monotonic() + 10
    while victim["name"] not in [p["name"] for p in processes(data, victim["role"])]:
        if time.monotonic() > deadline:
            sys.exit(f"{victim['name']} does not start again")
        time.sleep(0.05)


def processes(data, role):
    with open(os.path.join(data, "cluster.json")) as file:
        return [p for p in json.load(file)["processes"] if p["role"] == role]


def wait_until_full(url, replicas):
    deadline = time.monotonic() + FULL_WITHIN
    while True:
        said = subprocess.run([DKC, "status", "--json", "--url", url], capture_output=True, check=False)
        if said.returncode == 0:
            summary = json.loads(said.stdout)["summary"]
            if summary["shards"] > 0 and summary["shards_open"] == summary["shards"]:
                if summary["in_sync_min"] >= replicas:
                    return
        if time.monotonic() > deadline:
            sys.exit(f"not every in-sync set is full within {FULL_WITHIN} s: {said.stdout[:1000]}")
        time.sleep(0.2)


if __name__ == "__main__":
    main()
