#!/bin/sh
# Writes a corpus of real words, one per line, to FILE: all licences and changelogs of this machine,
# repeated up to LINES lines.
#
#   tests/corpus.sh FILE [LINES]
set -eu

file=$1
lines=${2:-5000000}
export LC_ALL=C

# A word is the text between blanks and control characters, including Unicode and invalid bytes.
# Texts that are longer than a key may be (1024 bytes) are left out.
text() {
    find /usr/share/common-licenses -type f -exec cat {} +
    find /usr/share/doc -type f -iname 'changelog*' ! -name '*.gz' -exec cat {} +
    find /usr/share/doc -type f -iname 'changelog*.gz' -exec zcat {} +
}

text | tr -s '[:space:][:cntrl:]' '\n' | awk 'length($0) > 0 && length($0) <= 1024' > "$file.once"
once=$(wc -l < "$file.once")
if [ "$once" -eq 0 ]; then
    echo "no text under /usr/share/common-licenses and /usr/share/doc" >&2
    exit 1
fi
repeats=$(((lines + once - 1) / once))
for _ in $(seq "$repeats"); do cat "$file.once"; done | head -n "$lines" > "$file"
rm "$file.once"
echo "$file: $(wc -l < "$file") lines, $once of them before it repeats" >&2
