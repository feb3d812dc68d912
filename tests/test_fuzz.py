"""No damaged file runs anything, hangs, or ends a reader but by one line."""

from tests.fuzz import child, parent, readers


def test_a_hundred_damaged_files_for_every_reader():
    found = parent.run(readers.READERS, 100, seed=3)
    print("\n" + parent.table(found))
    assert {name: one.failed for name, one in found.items() if one.failed} == {}
    for name, one in found.items():
        # Some are read, some are not: the damage reaches what is to be judged.
        assert one.read + one.refused == 100 and one.read and one.refused, name


def _fail(path):
    text = path.read_bytes()
    if text == b"hang":
        while True:
            pass
    if text == b"crash":
        import ctypes

        ctypes.string_at(0)
    if text == b"run":
        import os

        os.system("true")
    if text == b"raise":
        raise KeyError("x")
    if text == b"fill":
        bytearray(2 * child.MEMORY)


def test_the_fuzz_sees_a_crash_a_hang_and_what_was_run(tmp_path, monkeypatch):
    # The child is a process of its own: it gets the reader by a module beside it.
    kinds = (b"fine", b"crash", b"hang", b"run", b"raise", b"fill")
    (tmp_path / "planted.py").write_text(
        "from tests import test_fuzz\n"
        "from tests.fuzz import child, readers\n"
        "import sys\n"
        f"KINDS = {kinds}\n"
        "child.SECONDS = 1.0\n"
        "reader = readers.Reader(lambda: [], lambda *_: b'', test_fuzz._fail, 'x')\n"
        "readers.READERS['planted'] = reader\n"
        "readers.file = lambda name, seed, i, sound: KINDS[i]\n"
        "child.read(['planted'], *map(int, sys.argv[3:6]))\n"
    )
    monkeypatch.setattr(parent, "CHILD", [str(tmp_path / "planted.py")])
    monkeypatch.setenv("PYTHONPATH", str(parent.ROOT))
    one = parent.run(["planted"], len(kinds), 0)["planted"]
    assert one.read == 1
    assert [i for i, _ in one.failed] == [1, 2, 3, 4, 5]
    for (_, told), want in zip(
        one.failed,
        ("crash", "hang", "ran os.system", "KeyError", "Memory"),
        strict=True,
    ):
        assert want in told
