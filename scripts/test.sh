#!/usr/bin/env bash
# Makes the test environment, then lints, checks types and runs every test.
#
#   scripts/test.sh [PYTEST ARGUMENTS]
#
# Without arguments the fast tests run once more on Python 3.12, where one is
# found. Variables:
#   TUNER_PYTHON=...     interpreter of the environment (found when unset)
#   TUNER_VENV=DIR       where the environment lies (.venv-test)
#   TUNER_WORKERS=N      test processes (as many as there are cores, 4 at most)
#   TUNER_TORCH=1        install torch on a Python other than 3.11, too
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$PWD
venv=${TUNER_VENV:-.venv-test}

say() { printf '== %s\n' "$*"; }
die() { printf '%s\n' "$*" >&2; exit 1; }

version() {  # prints 3.11 for an interpreter that runs and can make venvs
  "$1" -c 'import sys, venv; print("%d.%d" % sys.version_info[:2])' 2>/dev/null
}

find_python() {  # prints an interpreter of version $1, by name or from pyenv
  local candidate
  for candidate in "python$1" python3 python; do
    if [ "$(version "$candidate")" = "$1" ]; then
      command -v "$candidate"
      return
    fi
  done
  command -v pyenv >/dev/null || return 1
  while read -r candidate; do
    candidate=$(pyenv root)/versions/$candidate/bin/python
    if [ "$(version "$candidate")" = "$1" ]; then
      printf '%s\n' "$candidate"
      return
    fi
  done < <(pyenv versions --bare)
  return 1
}

stamp() {  # prints what the environment at $2 would be made of
  "$1" - "$root" "${@:3}" <<'PY'
import hashlib, pathlib, sys
files = [pathlib.Path(f).read_bytes() for f in ('setup.cfg', 'scripts/test.sh')]
parts = [sys.version, *sys.argv[1:], *(hashlib.sha256(f).hexdigest() for f in files)]
print('\n'.join(parts))
PY
}

make_env() {  # make_env PYTHON DIR PACKAGE...: a new one unless the stamp holds
  local python=$1 dir=$2 want
  want=$(stamp "$@")
  if [ -f "$dir/stamp" ] && [ "$(cat "$dir/stamp")" = "$want" ] &&
    [ -n "$(version "$dir/bin/python")" ]; then
    say "environment $dir: as it was ($("$dir/bin/python" --version))"
    return
  fi
  if [ -e "$dir" ] && [ ! -f "$dir/pyvenv.cfg" ]; then
    die "$dir is there and is no virtual environment; name another as TUNER_VENV"
  fi
  say "environment $dir: new, $("$python" --version), ${*:3}"
  rm -rf "$dir"
  if command -v uv >/dev/null; then
    uv venv --quiet --python "$python" "$dir"
    uv pip install --quiet --python "$dir/bin/python" "${@:3}"
  else
    "$python" -m venv "$dir"
    "$dir/bin/python" -m pip install -qq --disable-pip-version-check "${@:3}"
  fi
  printf '%s\n' "$want" > "$dir/stamp"
}

python=${TUNER_PYTHON:-$(find_python 3.11 || find_python 3.12 ||
  find_python 3.13 || true)}
[ -n "$python" ] || die "no Python 3.11 or later here; name one as TUNER_PYTHON"
main_version=$(version "$python") || die "TUNER_PYTHON=$python does not run"

# torch 2.13.0 for Python 3.11 is a build for CPUs; other builds are gigabytes.
if [ "$main_version" = 3.11 ]; then
  packages=(-e '.[test,gguf,harness,parity]' torch==2.13.0)
  export TUNER_REQUIRE_TORCH=1
elif [ "${TUNER_TORCH:-}" = 1 ]; then
  packages=(-e '.[test,gguf,harness,parity]')
  export TUNER_REQUIRE_TORCH=1
else
  packages=(-e '.[test,gguf]')
  say "Python $main_version: no torch (TUNER_TORCH=1 installs it)," \
    'so the parity tests are skipped'
fi

make_env "$python" "$venv" "${packages[@]}"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

say 'ruff check'
"$venv/bin/ruff" check .
say 'ruff format'
"$venv/bin/ruff" format --check --quiet . ||
  die 'not formatted: run `ruff format .`'
say 'mypy'
"$venv/bin/mypy"
# A file's tests share what they compile, so that a process takes whole files.
n=${TUNER_WORKERS:-$("$venv/bin/python" -c \
  'import os; print(min(4, os.cpu_count() or 1))')}
workers=()
[ "$n" = 1 ] || workers=(-n "$n" --dist loadfile)
say "pytest ${workers[*]-} $*"
"$venv/bin/python" -m pytest ${workers[@]+"${workers[@]}"} "$@"

[ $# -eq 0 ] || exit 0
if [ "$main_version" = 3.12 ]; then
  exit 0
elif second=$(find_python 3.12); then
  make_env "$second" "$venv-3.12" -e '.[test,gguf]'
  say 'pytest, fast tests, Python 3.12'
  unset TUNER_REQUIRE_TORCH
  "$venv-3.12/bin/python" -m pytest ${workers[@]+"${workers[@]}"} \
    -m 'not slow and not parity'
else
  say 'no working Python 3.12 here: the fast tests are not repeated on one'
fi
