"""Rust source for scripts: the code, the comments, and the parts that are compiled for tests only.

Files are read as Latin-1, so that offsets are bytes: llvm counts columns that way.
"""

import bisect
import pathlib
import re

ROOT = pathlib.Path(__file__).resolve().parent.parent

TOKEN = re.compile(
    r"(?P<comment>//[^\n]*|/\*.*?\*/)"
    r"|b?r(?P<hashes>#*)\"(?:.*?)\"(?P=hashes)"
    r"|b?\"(?:\\.|[^\"\\])*\""
    r"|b?'(?:\\(?:x..|u\{[^}]*\}|.)|[^\\'])'",
    re.DOTALL,
)

BRACKET = re.compile(r"[(\[{)\]}]")


class Source:
    """A file, and which of its spans are compiled for tests only."""

    def __init__(self, path):
        self.path = path
        self.name = str(path.relative_to(ROOT))
        self.text = path.read_bytes().decode("latin-1")
        self.lines = self.text.split("\n")
        self.code = blank(self.text)
        self.starts = [0]
        for line in self.lines:
            self.starts.append(self.starts[-1] + len(line) + 1)
        self.tests = self.find_tests()

    def find_tests(self):
        """Spans of what is compiled for tests only; the whole file if its `mod` line is."""
        folder, stem = self.path.parent, self.path.stem
        for above in [folder / "mod.rs", folder / "lib.rs", folder / "main.rs", folder.with_suffix(".rs")]:
            if above.exists() and re.search(rf"#\[cfg\(test\)\]\s+mod {stem};", above.read_text()):
                return [(0, len(self.code))]
        spans = []
        for found in re.finditer(r"#\[cfg\(test\)\]", self.code):
            ends = re.compile(r"[{;]").search(self.code, found.end())
            spans.append((found.start(), self.closing(ends.start()) if ends[0] == "{" else ends.end()))
        return spans

    def closing(self, opening):
        """The offset after the bracket that closes the one at `opening`."""
        depth = 0
        for bracket in BRACKET.finditer(self.code, opening):
            depth += 1 if bracket[0] in "([{" else -1
            if depth == 0:
                return bracket.end()
        raise ValueError(f"{self.name}: the bracket at byte {opening} is not closed")

    def is_test(self, offset):
        return any(start <= offset < end for start, end in self.tests)

    def line_of(self, offset):
        return bisect.bisect_right(self.starts, offset)


def blank(text):
    """The text with comments, strings and characters replaced by spaces, every other byte where it was."""

    def spaces(found):
        return re.sub(r"[^\n]", " ", found[0])

    # A character outside of ASCII is several bytes here, so `'…'` is not seen by the pattern.
    return TOKEN.sub(spaces, re.sub(r"'[\x80-\xff]+'", spaces, text))
