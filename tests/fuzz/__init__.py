"""Damaged files through every reader: python -m tests.fuzz --count=5000.

    --count=N      mutated files for each reader
    --seed=N       of the mutations: the same seed makes the same files
    --readers=A,B  only these
    --keep=DIR     write every file that failed there

A reader may read a file or refuse it with one line of `vitssl.errors`. It fails by any
other exception, a line that is none, a crash, more than `SECONDS` or `MEMORY`, or by
running anything. Files are read in child processes, which the system ends where they
pass their bounds; a child that is ended is started again behind the file that did it.
"""
