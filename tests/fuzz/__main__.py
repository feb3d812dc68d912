"""See the docstring of the package."""

import argparse
import os
import pathlib
import sys

from tests import fuzz
from tests.fuzz import child, parent, readers


def main(argv) -> int:
    """Fuzz, print the table and every failure; return 1 if there is one."""
    parser = argparse.ArgumentParser(
        "tests.fuzz",
        description=fuzz.__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--readers", default=",".join(readers.READERS))
    parser.add_argument("--keep", default="")
    flags = parser.parse_args(argv)
    found = parent.run(flags.readers.split(","), flags.count, flags.seed)
    print(parent.table(found))
    for name, one in found.items():
        for i, how in one.failed:
            print(f"{name} {i}: {how}")
            if flags.keep:
                os.makedirs(flags.keep, exist_ok=True)
                data = readers.file(name, flags.seed, i, readers.READERS[name].made())
                kept = pathlib.Path(flags.keep, f"{i}-{readers.READERS[name].name}")
                kept.write_bytes(data)
    return int(any(one.failed for one in found.values()))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child.read(sys.argv[2].split(","), *map(int, sys.argv[3:6]))
    else:
        sys.exit(main(sys.argv[1:]))
