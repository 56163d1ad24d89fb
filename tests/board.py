#!/usr/bin/env python3
"""Checks the dashboard and the alerts with a running cluster: $DKC_CACHE/venv/bin/python tests/board.py

A real Prometheus with the jobs and rules of deploy/ scrapes a `dkc dev` ($DKC_BIN) under load. In normal operation no alert
may fire; then a node is killed, and the alerts for that must fire. The query of every panel is run: Prometheus must accept
it, and every panel except those for faults must have data. The output is that in docs/operations.md.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import yaml

import docs

DEPLOY = docs.REPOSITORY / "deploy"
# In seconds: Grafana's value of $__rate_interval at this interval.
SCRAPE, RATE_INTERVAL, PATIENCE = 1, 10, 60
# These panels show faults that this test does not cause.
MAY_BE_EMPTY = {"Refused by nodes, by reason"}
# The disk that the tests run on may be slow.
OF_THE_MACHINE = {"DkcFsyncSlow"}
AFTER_A_DEATH = {"DkcInSyncBelowReplicas", "DkcProcessDown"}


def panels():
    return json.loads((DEPLOY / "grafana/board.json").read_text())["panels"]


def configuration(processes):
    """Writes prometheus.yml with this cluster's addresses."""
    config = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())
    config["global"] = {"scrape_interval": f"{SCRAPE}s", "evaluation_interval": f"{SCRAPE}s"}
    config["rule_files"] = [str(DEPLOY / "prometheus/rules.yml")]
    for job in config["scrape_configs"]:
        role = job["job_name"].removeprefix("dkc-")
        found = [each["addresses"] for each in processes if each["role"] == role]
        job["static_configs"] = [{"targets": [each.get("metrics") or each["grpc"] for each in found]}]
    return config


class Prometheus:
    def __init__(self, address):
        self.address = address

    def ask(self, path, **query):
        url = f"http://{self.address}/api/v1/{path}?{urllib.parse.urlencode(query)}"
        try:
            return json.load(urllib.request.urlopen(url, timeout=10))["data"]
        except urllib.error.HTTPError as error:
            if error.code == 503:  # Prometheus is still starting.
                raise
            raise docs.Problem(f"Prometheus refuses {query}: {error.read().decode()}") from error

    def values(self, expression):
        """(labels, value) of each series now; the quantile of an empty histogram is NaN."""
        asked = expression.replace("$__rate_interval", f"{RATE_INTERVAL}s")
        found = self.ask("query", query=asked)["result"]
        return [(each["metric"], float(each["value"][1])) for each in found if each["value"][1] != "NaN"]

    def alerts(self):
        return {alert["labels"]["alertname"] for alert in self.ask("alerts")["alerts"]}

    def all_up(self):
        targets = self.ask("targets")["activeTargets"]
        return bool(targets) and all(target["health"] == "up" for target in targets)

    def evaluated(self):
        """The rules that were evaluated after the last scrape of all targets."""
        rules = self.ask("rules")["groups"][0]["rules"]
        return rules if all(rule["health"] == "ok" for rule in rules) else []


@contextlib.contextmanager
def prometheus(folder, processes):
    address = docs.Ports().rewrite("127.0.0.1:9090")
    file = folder / "prometheus.yml"
    file.write_text(yaml.safe_dump(configuration(processes)))
    binary = Path(os.environ["DKC_CACHE"]) / "prometheus-2.53/usr/bin/prometheus"
    flags = [f"--config.file={file}", f"--storage.tsdb.path={folder}/tsdb", f"--web.listen-address={address}", "--log.level=warn"]
    with open(folder / "prometheus.log", "w") as log, docs.session(binary, *flags, stdout=log, stderr=log):
        yield Prometheus(address)


def wait_until(holds, what):
    until = time.monotonic() + PATIENCE
    while True:
        with contextlib.suppress(OSError):
            if said := holds():
                return said
        if time.monotonic() > until:
            raise docs.Problem(f"after {PATIENCE} s: {what}")
        time.sleep(0.2)


def drawn(panel, asked):
    """The data of a panel: (legend, value) of each series."""
    for target in panel["targets"]:
        for labels, value in asked.values(target["expr"]):
            yield re.sub(r"{{(\w+)}}", lambda label: labels.get(label[1], ""), target["legendFormat"]), value


def written(value, unit):
    if unit == "bytes":
        return f"{value / 2**30:.1f} GiB" if value >= 2**30 else f"{value / 2**20:.1f} MiB"
    if unit == "percentunit":
        return f"{100 * value:.0f} %"
    if unit == "s":
        return f"{value * 1000:.1f} ms" if value < 1 else f"{value:.1f} s"
    return f"{value:.0f}/s" if unit in ["reqps", "ops"] else f"{value:g}"


def table(asked):
    """The dashboard as lines, and the panels without data."""
    lines, empty = [], []
    for panel in panels():
        series = list(drawn(panel, asked))
        if not series and panel["title"] not in MAY_BE_EMPTY:
            empty.append(panel["title"])
        unit = panel["fieldConfig"]["defaults"]["unit"]
        shown = ", ".join(f"{legend} {written(value, unit)}".strip() for legend, value in series)
        lines.append(f"{panel['title']:<34} {shown or '-'}")
    return lines, empty


def story(folder, address):
    processes = json.loads((folder / "cluster/data/cluster.json").read_text())["processes"]
    bench = ["--clients", "16", "--batch", "100", "--seconds", "600"]
    environment = os.environ | {"DKC_URL": f"http://{address}"}
    with (
        prometheus(folder, processes) as asked,
        docs.session(os.environ["DKC_BIN"], "bench", *bench, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL),
    ):
        wait_until(asked.all_up, "not everything is scraped")
        wait_until(asked.evaluated, "not every rule can be evaluated")
        wait_until(lambda: asked.values("sum(increase(dkc_requests_total[5s])) > 0"), "no request was seen")
        # A target that starts late is down at first.
        wait_until(lambda: asked.alerts() <= OF_THE_MACHINE, "all is well, and alerts are on")
        with contextlib.suppress(urllib.error.HTTPError):
            urllib.request.urlopen(f"http://{address}/v1/counters/board/key/increment", data=b"nonsense", timeout=10)
        victim = next(each for each in processes if each["role"] == "storage-node")
        os.kill(victim["pid"], signal.SIGKILL)
        wait_until(lambda: AFTER_A_DEATH <= asked.alerts(), f"not on, though a node is dead: {sorted(AFTER_A_DEATH)}")
        # A panel of rates has data after two scrapes.
        wait_until(lambda: not table(asked)[1], "a panel has nothing to draw")
        lines, _ = table(asked)
        return lines, asked.alerts()


def main():
    with tempfile.TemporaryDirectory(prefix="dkc-board-") as folder:
        ports = docs.Ports()
        with docs.cluster(Path(folder) / "cluster", ports):
            lines, alerts = story(Path(folder), ports.rewrite("127.0.0.1:8080"))
    print("\n".join(lines))
    print(f"alerts: {', '.join(sorted(alerts))}")


if __name__ == "__main__":
    try:
        main()
    except docs.Problem as problem:
        sys.exit(f"board: {problem}")
