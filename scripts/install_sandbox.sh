#!/usr/bin/env bash
# bubblewrap, in which eval.py runs the programs of code benchmarks: installed if it is missing and root may use apt.
set -euo pipefail
if command -v bwrap >/dev/null; then exit 0; fi
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "installing bubblewrap"
    export DEBIAN_FRONTEND=noninteractive
    apt-get install -qq -y bubblewrap >/dev/null 2>&1 ||
        { apt-get update -qq >/dev/null 2>&1 && apt-get install -qq -y bubblewrap >/dev/null 2>&1; } || true
fi
command -v bwrap >/dev/null ||
    echo "bubblewrap is missing and could not be installed (apt install bubblewrap): code benchmarks are refused, their tests skipped" >&2
