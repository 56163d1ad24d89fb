#!/bin/sh
# Counts a real corpus with `dkc count` and compares every word with `sort | uniq -c`.
#
#   tests/count_words.sh [URL]        counts on a running cluster, else starts one of its own
#
# DKC names the binary (default: `dkc` in PATH), LINES the size (default 5,000,000). Each run uses a new
# namespace, so it can use a cluster that has counted before.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
dkc=${DKC:-dkc}
lines=${LINES:-5000000}
folder=$(mktemp -d)
dev=
finish() {
    if [ -n "$dev" ]; then
        kill "$dev" 2> /dev/null || true
        wait "$dev" || true
    fi
    rm -rf "$folder"
}
trap finish EXIT
trap 'exit 1' INT TERM

url=${1:-}
if [ -z "$url" ]; then
    mkfifo "$folder/said"
    "$dkc" dev --data "$folder/data" --http 127.0.0.1:0 > "$folder/said" &
    dev=$!
    read -r said url < "$folder/said" || true
    [ "${said:-}" = ready ] || { echo "dkc dev is not ready" >&2; exit 1; }
fi

"$here/corpus.sh" "$folder/words" "$lines"
LC_ALL=C sort "$folder/words" | LC_ALL=C uniq -c > "$folder/uniq"

namespace=words-$(date +%s)-$$
"$dkc" count "$namespace" "$folder/words" --url "$url" --json > "$folder/report" || {
    echo "dkc count ended with $?:" >&2
    cat "$folder/report" >&2
    exit 1
}
python3 -c 'import json, sys; r = json.load(open(sys.argv[1])); print("%d lines in %.1f s, %d lines/s" % (r["applied"], r["seconds"], r["per_second"]))' "$folder/report"
python3 "$here/compare_counts.py" --url "$url" --namespace "$namespace" \
    --corpus "$folder/words" --report "$folder/report" --uniq "$folder/uniq"
