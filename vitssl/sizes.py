"""Sizes of images in pixels: the side of a square, or (height, width)."""

from collections.abc import Iterator

Size = int | tuple[int, int]


def pair(size: Size) -> tuple[int, int]:
    """Return (height, width)."""
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def aspect(size: Size) -> float:
    """Return width / height."""
    height, width = pair(size)
    return width / height


def written(size: Size) -> str:
    """Return a size for people: "48 px", "48 x 96 px"."""
    return f"{size} px" if isinstance(size, int) else "{} x {} px".format(*size)


def whole(size: Size, patch: int) -> Size:
    """Return the largest size of whole patches, at least one, inside a size."""
    height, width = (max(patch, side // patch * patch) for side in pair(size))
    return height if isinstance(size, int) else (height, width)


def faults(size: Size, patch: int, key: str = "model.patch") -> Iterator[str]:
    """Yield why patches of a side do not fit a size, if they do not."""
    wrong = [side for side in pair(size) if patch >= 1 and side % patch]
    if not wrong:
        return
    below = wrong[0] // patch * patch
    near = "nearest" if isinstance(size, int) else f"nearest to {wrong[0]}"
    yield f"must be a multiple of {key}={patch}; {near} are {below} and {below + patch}"
