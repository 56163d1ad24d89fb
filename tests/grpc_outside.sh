#!/usr/bin/env bash
# Starts a small cluster and calls its gRPC ports with a foreign client (grpc_outside.py). DKC names the binary (default:
# `dkc` in PATH). Requires the venv of `scripts/setup --tests`.
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
source "$here/../scripts/env"
dkc="${DKC:-dkc}"
folder="$(mktemp -d)"
dev=
finish() {
    if [[ -n "$dev" ]]; then
        kill "$dev" 2>/dev/null || true
        wait "$dev" || true
    fi
    rm -rf "$folder"
}
trap finish EXIT

mkfifo "$folder/said"
"$dkc" dev --nodes 1 --shards 1 --data "$folder/data" --http 127.0.0.1:0 >"$folder/said" &
dev=$!
read -r said _ <"$folder/said" || true
[[ "${said:-}" == ready ]] || { echo "dkc dev is not ready" >&2; exit 1; }
"$DKC_CACHE/venv/bin/python" "$here/grpc_outside.py" "$folder/data/cluster.json"
