# Sourced by the scripts here: makes the virtual environment and keeps it up to date.
# shellcheck shell=bash
#
# Sets `root` (the repository) and `python` (the environment's interpreter), both
# absolute. $root/.venv gets what requirements.lock pins and vitssl itself, editable;
# it is brought up to date when the lock, pyproject.toml, the extras or the place of
# the clone change. Optional extras of pyproject.toml: VITSSL_EXTRAS=cuda,wandb

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
python=$root/.venv/bin/python
# Modules without byte code start three times slower, in every worker process too.
unset PYTHONDONTWRITEBYTECODE
# Packages of another environment would come before the pinned ones.
unset PYTHONPATH PYTHONHOME

say() { printf 'launch: %s\n' "$*" >&2; }

fail() {
  say "$*"
  exit 2
}

new_enough() {
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

has_uv() { uv --version >/dev/null 2>&1; }

# Prints the path of the Python to use; the versions the lock was tested on go first.
find_python() {
  local name
  for name in python3.12 python3.11 python3.13 python3.14 python3 python; do
    # A version manager may put a name on the PATH that does not run.
    if new_enough "$name"; then
      command -v "$name"
      return
    fi
  done
  return 1
}

make_venv() {
  local base
  base=$(find_python) ||
    fail "no Python 3.11 or newer on the PATH; install one, for example python3.12."
  say "making $root/.venv with $("$base" --version) ($base)"
  rm -rf -- "$root/.venv"
  "$base" -m venv "$root/.venv" >/dev/null && return
  rm -rf -- "$root/.venv" # Half of one; Debian's Python stops at its missing pip.
  has_uv && uv venv --quiet --python "$base" "$root/.venv" && return
  fail "$base cannot make a virtual environment (see above). Debian and Ubuntu have" \
    "the missing part in a package of their own, for example python3.12-venv."
}

install_packages() {
  local project="$root${VITSSL_EXTRAS:+[$VITSSL_EXTRAS]}"
  say "installing the packages of requirements.lock (1.3 GB, about two minutes)"
  if has_uv; then
    uv pip install --quiet --compile-bytecode --python "$python" \
      -r "$root/requirements.lock" -e "$project" && return
    say "uv did not install the packages (see above); trying pip."
  fi
  "$python" -m pip --version >/dev/null 2>&1 ||
    fail "there is no pip in $root/.venv and uv did not do; remove that folder, try again."
  "$python" -m pip install -qq --disable-pip-version-check \
    -r "$root/requirements.lock" -e "$project" ||
    fail "pip did not install the packages (see above)."
}

# Says what the environment has to hold.
wanted() {
  cat -- "$root/requirements.lock" "$root/pyproject.toml" | cksum
  printf '%s\n' "$root" "${VITSSL_EXTRAS:-}"
}

up_to_date() {
  [ -x "$python" ] && [ "$(wanted)" = "$(cat -- "$root/.venv/installed" 2>/dev/null)" ]
}

prepare() {
  up_to_date && return
  # Two launches at once install one after the other, where the system can lock.
  exec 9<"$root/requirements.lock"
  if command -v flock >/dev/null; then flock 9 || true; fi
  if ! up_to_date; then
    "$python" -c '' >/dev/null 2>&1 || make_venv
    new_enough "$python" ||
      fail "$root/.venv is older than Python 3.11; remove it and try again."
    install_packages
    wanted >"$root/.venv/installed"
  fi
  exec 9<&-
}

prepare
