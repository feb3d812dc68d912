#!/usr/bin/env bash
# Trains on this machine; makes the virtual environment first if it is missing.
#
#   launch/local.sh --config=configs/hjepa.py [--workdir=DIR] [--config.KEY=VALUE ...]
#
# The path of a config may be relative to where you are or to the repository; all
# other paths, and runs/ where the results go by default, are relative to where you
# are. On a machine with an NVIDIA GPU: VITSSL_EXTRAS=cuda launch/local.sh ...
set -euo pipefail
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source-path=SCRIPTDIR source=environment.sh
. "$here/environment.sh"

# Prints the path (with its :argument) as given if it is there, else from the root.
locate() {
  local file=${1%%:*}
  if [ ! -e "$file" ] && [ -e "$root/$file" ]; then
    printf '%s\n' "$root/$1"
  else
    printf '%s\n' "$1"
  fi
}

arguments=()
previous=
for argument in "$@"; do
  case $argument in
    --config=*) argument=--config=$(locate "${argument#--config=}") ;;
    *) if [ "$previous" = --config ]; then argument=$(locate "$argument"); fi ;;
  esac
  arguments+=("$argument")
  previous=$argument
done
# An empty array is an unset variable to the bash 3.2 that macOS has.
exec "$python" -m vitssl.main ${arguments[@]+"${arguments[@]}"}
