#!/usr/bin/env python3
"""Checks that the loops of docs/http.md end as documented, whether a gateway, a proxy or no server responds."""

import json
import re
import sys
import types
from pathlib import Path

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "http.md"


class Answer:
    def __init__(self, status, body="<html>", **headers):
        self.status, self.text = status, body
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}

    def json(self):
        return json.loads(self.text)


def problem(status, outcome, **headers):
    return Answer(status, json.dumps({"type": "x", "outcome": outcome, "detail": "why"}), **headers)


APPLIED = Answer(200, '{"namespace":"n","key":"k","applied":1}')
FROZEN = problem(503, "not-applied", Retry_After="2")
BAD = problem(400, "not-applied")
OLD = problem(410, "unknown")
# The responses, and the end of each loop: without a key, and with one (which retries while the outcome is unknown).
CASES = [
    ([APPLIED], "applied", "applied"),
    ([FROZEN, APPLIED], "applied", "applied"),
    ([BAD], "error", "error"),
    ([None, APPLIED], "unknown", "applied"),
    ([problem(504, "unknown"), APPLIED], "unknown", "applied"),
    ([OLD], "unknown", "unknown"),
    ([None, BAD], "unknown", "unknown"),
    ([Answer(429, Retry_After="Sun, 29 Nov 2026 10:00:00 GMT"), APPLIED], "applied", "applied"),
    *[([Answer(status, body), APPLIED], "unknown", "applied")
      for status in [200, 500, 502, 503, 504] for body in ["<html>", "", "[]", "7", "null", '{"outcome": "fine"}']],
    *[([Answer(status, body)], "error", "error")
      for status in [301, 307, 403, 404, 413, 501, 505] for body in ["<html>", "", '"x"', '{"outcome": []}']],
    # A proxy may have replaced the body of a 410, after which the outcome stays unknown.
    *[([Answer(410, body)], "unknown", "unknown") for body in ["<html>", "", '"x"', '{"outcome": []}']],
    ([Answer(502), Answer(404)], "unknown", "unknown"),
]


def main():
    code = "\n".join(re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL))
    wrong = 0
    for answers, *wanted in CASES:
        for name, want in zip(["write", "write_once"], wanted):
            left, slept = list(answers), []
            world = {"send": lambda *_: left.pop(0), "time": types.SimpleNamespace(sleep=slept.append)}
            exec(code, world)
            try:
                got = world[name]("request", *(["key"] if name == "write_once" else []))
            except ValueError:
                got = "error"
            if got != want:
                wrong += 1
                print(f"{name}: {[(a.status, a.text) if a else None for a in answers]} ends with {got}, not {want}")
    print(f"loops of http.md: {len(CASES)} cases, {wrong} wrong")
    sys.exit(1 if wrong else 0)


main()
