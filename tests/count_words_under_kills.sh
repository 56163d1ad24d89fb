#!/bin/sh
# Counts a real corpus while all storage nodes and coordinators are killed in turn with `kill -9`, and
# compares every word. The counts must be exact, and the exit code 0.
#
#   tests/count_words_under_kills.sh              nodes and coordinators
#   tests/count_words_under_kills.sh --gateway    one of two gateways as well
#
# DKC names the binary (default: `dkc` in PATH), LINES the size (default 5,000,000: the count must last
# until all kills are done), DOWN_SECONDS the time that each process stays dead (default 3).
set -eu

here=$(cd "$(dirname "$0")" && pwd)
export DKC="${DKC:-dkc}" LINES="${LINES:-5000000}"
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

gateways=1
variant=
if [ "${1:-}" = --gateway ]; then
    gateways=2
    variant=--gateway
fi
mkfifo "$folder/said"
"$DKC" dev --data "$folder/data" --http 127.0.0.1:0 --coordinators 2 --gateways "$gateways" > "$folder/said" &
dev=$!
read -r said url < "$folder/said" || true
[ "${said:-}" = ready ] || { echo "dkc dev is not ready" >&2; exit 1; }

"$here/corpus.sh" "$folder/words" "$LINES"
LC_ALL=C sort "$folder/words" | LC_ALL=C uniq -c > "$folder/uniq"
python3 "$here/count_under_kills.py" --folder "$folder" --replicas 3 $variant
python3 "$here/compare_counts.py" --url "$url" --namespace words \
    --corpus "$folder/words" --report "$folder/report" --uniq "$folder/uniq"
