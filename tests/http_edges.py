#!/usr/bin/env python3
"""Sends the unusual requests of foreign clients, proxies and browsers to a gateway, and checks each response. DKC names the
binary.

The cases are known from other systems (caches, encodings, byte order marks, health checks, truncated emoji, numbers of
JavaScript, pages of other origins), each with similar ones. The Rust tests have many more; this runs them on the binary.
"""

import gzip
import json
import socket
import sys
import time

from one_gateway import one_gateway

NAMESPACE = "/v1/counters/edges"
BATCH = f"POST {NAMESPACE}/increment"
PACKED = gzip.compress(b"a\nb\n")
TEXT, NDJSON = "Content-Type: text/plain", "Content-Type: application/x-ndjson"
wrong = []


def main():
    with one_gateway("http_edges") as gateway:
        for case in [caches, codings, marks, probes, odd_items, numbers, browsers, many_who_ask]:
            case(gateway)
    sys.exit(f"http_edges: {len(wrong)} wrong: {', '.join(wrong)}" if wrong else 0)


def ask(gateway, line, *headers, body=b"", length=True):
    """Status, headers by their names in lower case, and body."""
    lines = [f"{line} HTTP/1.1", "Host: 127.0.0.1", "Connection: close", *headers]
    lines += [f"Content-Length: {len(body)}"] if body and length else []
    with socket.create_connection((gateway.host, gateway.port), timeout=10) as sock:
        sock.sendall("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
        answer = b"".join(iter(lambda: sock.recv(1 << 16), b""))
    head, _, body = answer.partition(b"\r\n\r\n")
    first, *rest = head.decode().split("\r\n")
    return int(first.split()[1]), dict(line.lower().split(": ", 1) for line in rest), body


def show(case, what, found, want):
    print(f"{case:<4} {what:<66} {found}{'' if found == want else f'   WRONG, {want} is right'}", flush=True)
    if found != want:
        wrong.append(f"{case} {what}")


def told(answered):
    """The applied increments, or the reason for a refusal."""
    status, _, body = answered
    answer = json.loads(body)
    if status != 200:
        return f"{status} {answer['type'].split('/')[-1]} {answer.get('field', '')}".strip()
    failed = [f"{item['index']}:{item['field']}" for item in answer.get("failed", [])]
    return " ".join([f"200 {answer.get('applied')}", *failed])


def caches(gateway):
    for line, vary in [
        (f"GET {NAMESPACE}/app-1.2.zip", "accept"),
        (f"POST {NAMESPACE}/app-1.2.zip/increment", "accept"),
        ("GET /readyz", None),
        ("GET /metrics", None),
        ("GET /v1/cluster", None),
        ("GET /nowhere", None),
    ]:
        _, headers, _ = ask(gateway, line)
        show("P04", line, (headers.get("cache-control"), headers.get("vary")), ("no-store", vary))
    show("P04", "GET /openapi.json", ask(gateway, "GET /openapi.json")[1].get("cache-control"), None)


def codings(gateway):
    chunked = b"%x\r\n%s\r\n0\r\n\r\n" % (len(PACKED), PACKED)
    for coding in ["gzip, chunked", "deflate, chunked", "identity, chunked", "chunked, chunked", "gzip\r\nTransfer-Encoding: chunked"]:
        answered = ask(gateway, BATCH, TEXT, f"Transfer-Encoding: {coding}", body=chunked, length=False)
        show("P09", f"Transfer-Encoding: {coding!r}", told(answered), "400 bad-input Transfer-Encoding")
    items = b'{"increments":[{"key":"a"}]}'
    for headers, body, want in [
        (["Content-Encoding: identity", "Content-Encoding: gzip"], PACKED, "415 unsupported-media-type"),
        (["Content-Encoding: gzip", "Content-Encoding: identity"], PACKED, "415 unsupported-media-type"),
        (["Content-Type: application/json"], items, "415 unsupported-media-type"),
        (["Host: other"], b"a\n", "400 bad-input Host"),
        (["Expect: foo"], b"a\n", "417 expectation-failed"),
        (["Content-Range: bytes 0-1/99"], b"a\n", "400 bad-input Content-Range"),
    ]:
        show("P09", f"text/plain and {headers}", told(ask(gateway, BATCH, TEXT, *headers, body=body)), want)
    for method in ["GET", "DELETE"]:
        answered = ask(gateway, f"{method} {NAMESPACE}/a", body=b"{}")
        show("P09", f"{method} with a body", told(answered), "400 bad-input body")
    show("P09", "counted by all that", json.loads(ask(gateway, f"GET {NAMESPACE}/a")[2])["value"], 0)


def marks(gateway):
    wide, bom = "apple\napple\n".encode("utf-16"), b"\xef\xbb\xbf"
    show("P15", "text in UTF-16, by its mark", told(ask(gateway, BATCH, TEXT, body=wide)), "400 bad-input body")
    for charset in ["utf-16", "latin1"]:
        answered = ask(gateway, BATCH, f"{TEXT}; charset={charset}", body=wide)
        show("P15", f"charset={charset}", told(answered), "415 unsupported-media-type")
    show("P15", "text after a mark", told(ask(gateway, BATCH, TEXT, body=bom + b"apple\napple\n")), "200 2")
    show("P15", "the key is", json.loads(ask(gateway, f"GET {NAMESPACE}/apple")[2])["value"], 2)
    status, _, body = ask(gateway, BATCH, body=bom + b'{"increments":[{"key":"a"}]}')
    show("P15", "JSON after a mark", (status, b"byte order mark" in body), (400, True))
    show("P15", "k<TAB>1.5", told(ask(gateway, BATCH, TEXT, body=b"k\t1.5\nl\n")), "200 1 0:delta")


def probes(gateway):
    for path in ["/livez", "/readyz"]:
        status, _, body = ask(gateway, f"OPTIONS {path}")
        show("P19", f"OPTIONS {path}", (status, body), (200, b""))
    with socket.create_connection((gateway.host, gateway.port)) as sock:
        sock.sendall(b"GET /livez HTTP/1.1\r\n\r\n")
        show("P28", "Keep-Alive", b"keep-alive: timeout=75" in sock.recv(1 << 16), True)


def odd_items(gateway):
    for item, field in [
        (r'{"key":"\ud83d"}', "key"),
        ('{"key":"b","delta":1e400}', "delta"),
        ('{"key":"b","delta":%s}' % ("[" * 200 + "]" * 200), "delta"),
        (r'{"key":"b","x":"\ud83d"}', "x"),
    ]:
        for form, body in [("", '{"increments":[{"key":"z"},%s]}' % item), (NDJSON, '{"key":"z"}\n%s\n' % item)]:
            answered = ask(gateway, BATCH, *filter(None, [form]), body=body.encode())
            show("P22", f"{form or 'JSON'}: {item[:40]}", told(answered), f"200 1 1:{field}")
    answered = ask(gateway, f"POST {NAMESPACE}/get", body=br'{"keys":["a","\ud83d"]}')
    show("P22", r'/get ["a","\ud83d"]', told(answered), "400 bad-input keys[1].key")


def numbers(gateway):
    most = 2**63 - 1
    for _ in range(3):
        ask(gateway, f"POST {NAMESPACE}/big/increment?delta={most}")
    value = str(3 * most)
    for line, body in [(f"GET {NAMESPACE}/big?value=string", b""), (f"POST {NAMESPACE}/get?value=string", b'{"keys":["big"]}')]:
        answer = json.loads(ask(gateway, line, body=body)[2])
        show("P25", line, answer.get("counters", [answer])[0]["value_string"], value)


def browsers(gateway):
    one = f"{NAMESPACE}/home/increment"
    for line, headers in [
        (f"POST {one}", ["Origin: https://evil.example", f"{TEXT};charset=UTF-8"]),
        (f"POST {one}", ["Origin: null"]),
        (f"POST {one}", ["Origin: http://127.0.0.1:3000", "Sec-Fetch-Site: same-site"]),
        (f"DELETE {NAMESPACE}/home", ["Origin: https://evil.example"]),
        (f"GET {NAMESPACE}/home", ["Sec-Fetch-Site: cross-site"]),
        (f"OPTIONS {one}", ["Origin: https://evil.example", "Access-Control-Request-Method: POST"]),
    ]:
        show("P26", f"{line.split()[0]} {headers[0]}", told(ask(gateway, line, *headers)), "403 forbidden-origin")
    # The fetch of Node sends Sec-Fetch-Mode, and is not a browser.
    show("P26", "a program", told(ask(gateway, f"POST {one}", "Sec-Fetch-Mode: cors")), "200 1")


def many_who_ask(gateway):
    began, pages = time.monotonic(), 0
    while time.monotonic() < began + 2:
        states = {node["state"] for node in json.loads(ask(gateway, "GET /v1/cluster")[2])["nodes"]}
        pages += 1
    show("13", f"/v1/cluster in a loop, {pages} pages in 2 s", (pages <= 11, states), (True, {"up"}))


main()
