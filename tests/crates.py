#!/usr/bin/env python3
"""Checks the crates of the workspace: their sources, their licences, and that no unwanted one is among them.

The checks are those of `cargo deny check bans licenses sources`, by `cargo metadata` and Cargo.lock, since that tool takes
longer to compile than dkc itself. Advisories (RustSec) are checked if $ADVISORY_DB names the folder of their database.
"""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

from cases import run_cases

REPOSITORY = Path(__file__).resolve().parent.parent
CRATES_IO = "registry+https://github.com/rust-lang/crates.io-index"

# Licences whose terms are met by the output of `scripts/third-party`.
ALLOWED = {
    "0BSD", "Apache-2.0", "Apache-2.0 WITH LLVM-exception", "BSD-2-Clause", "BSD-3-Clause", "BSL-1.0", "CC0-1.0", "ISC", "MIT",
    "MIT-0", "Unicode-3.0", "Unlicense", "Zlib", "bzip2-1.0.6",
}
# The crates that must not be used, not even through another crate, each with its reason.
BANNED = {
    "openssl-sys": "its C library is another one on each machine",
    "native-tls": "the same",
    "chrono": "time has one crate less to be wrong in: std, and rustix where that is not enough",
    "atty": "not kept any more: std has IsTerminal",
    "ansi_term": "not kept any more",
    "serde_yaml": "not kept any more",
}


def metadata():
    command = ["cargo", "metadata", "--locked", "--format-version", "1"]
    said = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    if said.returncode:
        sys.exit(said.stderr)
    return [package for package in json.loads(said.stdout)["packages"] if package["source"]]


class Licence:
    """An SPDX expression: OR, AND, parentheses, WITH; and "/", which formerly meant OR."""

    def __init__(self, text):
        self.words = re.findall(r"[()]|[^\s()]+", text.replace("/", " OR "))

    def is_allowed(self):
        allowed = self.any_of()
        return allowed and not self.words

    def any_of(self):
        allowed = self.all_of()
        while self.take("OR"):
            allowed = self.all_of() or allowed
        return allowed

    def all_of(self):
        allowed = self.one()
        while self.take("AND"):
            allowed = self.one() and allowed
        return allowed

    def one(self):
        if self.take("("):
            return self.any_of() and self.take(")")
        name = self.words.pop(0) if self.words else ""
        if self.take("WITH"):
            name += f" WITH {self.words.pop(0) if self.words else ''}"
        return name in ALLOWED

    def take(self, word):
        if self.words[:1] == [word]:
            self.words.pop(0)
            return True
        return False


def licences_are_allowed(packages):
    for package in packages:
        if not package["license"] or not Licence(package["license"]).is_allowed():
            yield f"{package['name']} {package['version']}: its licence is {package['license']}"


def all_come_from_crates_io(packages):
    for package in packages:
        if package["source"] != CRATES_IO:
            yield f"{package['name']} {package['version']} comes from {package['source']}"
    for package in tomllib.loads((REPOSITORY / "Cargo.lock").read_text())["package"]:
        if "source" in package and "checksum" not in package:
            yield f"{package['name']} {package['version']}: Cargo.lock has no checksum of it"


def none_is_banned(packages):
    for package in packages:
        if package["name"] in BANNED:
            yield f"{package['name']} {package['version']}: {BANNED[package['name']]}"


def no_advisory_is_open(packages):
    folder = os.environ.get("ADVISORY_DB")
    if not folder:
        print("crates: NOT CHECKED: advisories (ADVISORY_DB names no copy of RustSec's database)")
        return
    there = {(package["name"], package["version"]) for package in packages}
    for file in sorted(Path(folder).glob("crates/*/RUSTSEC-*.md")):
        advisory = tomllib.loads(re.search(r"```toml\n(.*?)```", file.read_text(), re.S)[1])
        about, versions = advisory["advisory"], advisory.get("versions", {})
        if "withdrawn" in about or about.get("informational"):
            continue
        fine = versions.get("patched", []) + versions.get("unaffected", [])
        for name, version in there:
            if name == about["package"] and not any(is_within(version, limits) for limits in fine):
                yield f"{name} {version}: {about['id']}: {about.get('url', '')}"


def numbers(version):
    return [int(part) for part in re.findall(r"\d+", version.split("-")[0].split("+")[0])][:3]


def is_within(version, limits):
    """Returns whether a version is in a range such as `>= 1.2.3, < 1.4` or `^1.2.3`, as advisories contain them."""
    own = numbers(version)
    for limit in limits.split(","):
        operator, bound = re.fullmatch(r"\s*([<>=^~]*)\s*([\w.+-]+)\s*", limit).groups()
        bound = numbers(bound)
        fine = {
            "<": own < bound,
            "<=": own <= bound,
            ">": own > bound,
            ">=": own >= bound,
            "=": own[: len(bound)] == bound,
            "": own[: len(bound)] == bound,
            "~": own >= bound and own[:2] == bound[:2],
            "^": own >= bound and same_series(own, bound),
        }[operator]
        if not fine:
            return False
    return True


def same_series(own, bound):
    leading = next((index for index, part in enumerate(bound) if part), len(bound) - 1)
    return own[: leading + 1] == bound[: leading + 1]


def main():
    packages = metadata()
    checks = [licences_are_allowed, all_come_from_crates_io, none_is_banned, no_advisory_is_open]
    failed = run_cases("crates", checks, packages)
    print(f"crates: {len(packages)} crates checked")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
