#!/usr/bin/env python
"""Many runs from a file of overrides; the same as `vitssl sweep`, see its --help.

.venv/bin/python launch/sweep.py FILE [--jobs=N | --slurm] ...
"""

import sys

from vitssl import cli

if __name__ == "__main__":
    sys.exit(cli.main(["sweep", *sys.argv[1:]]))
