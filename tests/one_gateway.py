"""A cluster of one node and one gateway, for measuring what clients can do to the gateway. DKC names the binary."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile

DKC = os.environ.get("DKC", "dkc")


@contextlib.contextmanager
def one_gateway(name, **how):
    """Its address and pid. `name`: of the test, for what goes wrong; `how`: as for Popen."""
    with tempfile.TemporaryDirectory() as folder:
        line = [DKC, "dev", "--nodes", "1", "--http", "127.0.0.1:0", "--data", folder]
        dev = subprocess.Popen(line, stdout=subprocess.PIPE, text=True, **how)
        try:
            ready = dev.stdout.readline()
            if not ready.startswith("ready http://"):
                sys.exit(f"{name}: dkc dev did not get ready")
            with open(os.path.join(folder, "cluster.json")) as file:
                processes = json.load(file)["processes"]
            pid = next(p["pid"] for p in processes if p["role"] == "gateway")
            yield ready.split("//")[1].strip(), pid
        finally:
            dev.send_signal(signal.SIGTERM)
            if dev.wait(30) != 0:
                sys.exit(f"{name}: dkc dev did not stop in order")


def memory(pid):
    """What the process holds, in bytes."""
    with open(f"/proc/{pid}/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmRSS"))
