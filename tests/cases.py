"""Shared by the scripts with cases: a case is a generator that yields a text for each failure."""

import concurrent.futures
import contextlib
import http.client
import itertools
import os
import socket
import sys
import time


class Broken(Exception):
    """A condition that a case waits for does not occur."""


def until(what, check, seconds):
    """Waits until `check` returns a true value, and returns it. A refused connection counts as false."""
    end = time.monotonic() + seconds
    while True:
        with contextlib.suppress(OSError, http.client.HTTPException):
            if found := check():
                return found
        if time.monotonic() > end:
            raise Broken(f"{what}: not within {seconds} s")
        time.sleep(0.05)


_CHOSEN = itertools.count(os.getpid() * 61)


def free_port():
    """A port on which nothing listens, below those that the system gives to connections that go out (32768 up)."""
    for nth in _CHOSEN:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", 10000 + nth % 10000))
            return probe.getsockname()[1]


def chosen(script, cases, names):
    """The cases with these names; all if no name is given."""
    known = {case.__name__: case for case in cases}
    if unknown := set(names) - set(known):
        sys.exit(f"{script}: no such case: {', '.join(unknown)}; there are {', '.join(known)}")
    return [case for name, case in known.items() if not names or name in names]


def run_cases(script, cases, *arguments, at_once=1):
    """Runs all cases, prints the failures of each, and returns how many failed. Cases that mostly wait may run `at_once`."""

    def passed(case):
        began = time.monotonic()
        try:
            problems = list(case(*arguments))
        except Broken as broken:
            problems = [str(broken)]
        took = time.monotonic() - began
        verdict = "FAILED" if problems else "ok"
        lines = [f"{script}: {case.__name__.replace('_', ' ')}: {verdict}, {took:.1f} s", *(f"  {problem}" for problem in problems)]
        print("\n".join(lines), flush=True)
        return not problems

    with concurrent.futures.ThreadPoolExecutor(at_once) as threads:
        failed = list(threads.map(passed, cases)).count(False)
    print(f"{script}: {len(cases) - failed} of {len(cases)} cases passed")
    return failed
