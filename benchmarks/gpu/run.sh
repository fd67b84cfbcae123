#!/usr/bin/env bash
# bash benchmarks/gpu/run.sh OUT: tests and times mtlfast on this machine's GPU. See README.md.
set -euo pipefail
cd "$(dirname "$0")/../.."
exec python3 benchmarks/gpu/kit.py "$@"
