#!/usr/bin/env bash
# Checks a real cluster against its own OpenAPI document: schemathesis sends requests that the document allows, and
# requests that it does not, and checks every response. The seed is fixed and the number of examples bounded, so it takes
# about a minute.
#
# DKC names the binary. The exceptions, and their reasons, are in api_fuzz.toml beside this script.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/env
DKC="${DKC:-$CARGO_TARGET_DIR/ci/dkc}"
SCHEMATHESIS="${SCHEMATHESIS:-$DKC_CACHE/venv/bin/schemathesis}"

FOLDER="$(mktemp -d)"
DEV=
finish() {
    local code=$?
    if [[ -n "$DEV" ]]; then
        kill "$DEV" 2>/dev/null || true
        wait "$DEV" || code=1
    fi
    if ((code == 0)); then
        rm -rf "$FOLDER"
    else
        echo "api_fuzz: failed; the cluster's folder is $FOLDER" >&2
    fi
    exit "$code"
}
trap finish EXIT

mkfifo "$FOLDER/ready"
"$DKC" dev --nodes 1 --http 127.0.0.1:0 --data "$FOLDER/data" >"$FOLDER/ready" 2>"$FOLDER/dev.log" &
DEV=$!
read -r -t 90 said url <"$FOLDER/ready" || { cat "$FOLDER/dev.log" >&2; exit 1; }
[[ "$said" == ready ]]

fuzz() {
    "$SCHEMATHESIS" --config-file tests/api_fuzz.toml run "$url/openapi.json" --url "$url" --phases examples,coverage,fuzzing \
        --seed 1 --generation-deterministic --max-examples "${EXAMPLES:-30}" --request-timeout 10 --continue-on-failure --no-color "$@"
}
# Requests that are allowed succeed, given the time; the others are refused.
fuzz --mode positive -H 'Request-Timeout-Ms: 5000'
fuzz --mode negative
# The cluster still runs and counts.
curl -sf -X POST "$url/v1/counters/after/k/increment?delta=5&return=value" | grep -q '"value":5'
