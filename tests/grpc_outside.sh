#!/usr/bin/env bash
# Starts a small cluster and asks its gRPC ports as a stranger would (grpc_outside.py). DKC names the binary (default:
# `dkc` in PATH). Wants the venv that `scripts/setup` makes.
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
