#!/usr/bin/env bash
# Runs the tests; makes the virtual environment first if it is missing.
#
#   launch/test.sh [PYTEST ARGUMENTS]     all tests without arguments
#
# Paths are relative to the repository. -n 0 runs the tests in one process.
set -euo pipefail
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source-path=SCRIPTDIR source=environment.sh
. "$here/environment.sh"

cd -- "$root"
exec "$python" -m pytest -n logical --maxprocesses=8 --dist worksteal "$@"
