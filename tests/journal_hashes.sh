#!/usr/bin/env bash
# Compares the traces of the simulator's seeds 1 to 1,000 with those that are recorded in tests/tests/journal-hashes:
# `journal_hashes.sh [--record]`. The hash of a trace covers the time and the number of every step and each group that is
# written to a log; each message, timer and draw moves those of the later steps. A change that leaves all hashes alone has
# changed no behaviour. A change that is meant to be visible records them again.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/env
SEEDS=1000
RECORDED=tests/tests/journal-hashes

cargo build --locked --profile ci -p tests --features planted-bugs,codec --bin sim
hashes() {
    # More seeds than needed: only some count.
    "$CARGO_TARGET_DIR/ci/sim" --from 1 --seeds "$SEEDS" |
        sed -nE 's/^seed=([0-9]+) .*hash=([0-9a-f]+) .*/\1 \2/p' | sort -n | awk -v seeds="$SEEDS" '$1 <= seeds'
}

if [[ "${1:-}" == --record ]]; then
    hashes >"$RECORDED"
    echo "journal_hashes: $(wc -l <"$RECORDED") recorded"
    exit
fi
found="$(mktemp)"
trap 'rm -f "$found"' EXIT
hashes >"$found"
if cmp --quiet "$RECORDED" "$found"; then
    echo "journal_hashes: all $(wc -l <"$found") seeds run as recorded"
else
    differ=$(comm -13 <(sort "$RECORDED") <(sort "$found") | wc -l)
    echo "journal_hashes: $differ of $SEEDS seeds run differently"
    exit 1
fi
