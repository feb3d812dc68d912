"""The results of a final evaluation as text, and as flat metrics."""

import re

# Columns by pattern of the key, in order: heading, how to write a value.
_COLUMNS = (
    (r"dim", "dim", "{:.0f}"),
    (r"knn/top1", "k-NN top-1", "{:.1%}"),
    (r"linear/top1", "linear top-1", "{:.1%}"),
    (r"fewshot/(\d+)/top1", r"\1-shot", "{:.1%}"),
    (r"quality/rankme", "RankMe", "{:.1f}"),
    (r"quality/std", "std", "{:.3g}"),
)


def format_table(rows: list[dict], note: str = "") -> str:
    """Return the rows of `evals.final` as a Markdown table that also reads as text.

    Args:
        rows: {"features": name of the row, metric: number}; a metric that a row lacks
            is a dash, and one of no known column is left to the logs.
        note: a line below, such as `Evals.protocol`.
    """
    keys = list(dict.fromkeys(key for row in rows for key in row))
    columns = [("features", "features", "{}")]
    for pattern, heading, form in _COLUMNS:
        for key in keys:
            if found := re.fullmatch(pattern, key):
                columns.append((key, found.expand(heading), form))
    lines = [[heading for _, heading, _ in columns]]
    for row in rows:
        lines.append([f.format(row[k]) if k in row else "-" for k, _, f in columns])
    width = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * n for n in width])
    text = [
        "| " + " | ".join(_pad(cell, n, i) for i, (cell, n) in enumerate(cells)) + " |"
        for cells in (zip(line, width, strict=True) for line in lines)
    ]
    return "\n".join([*text, *([note] if note else [])])


def _pad(cell, width, column):
    """Names to the left, numbers to the right."""
    return cell.ljust(width) if column == 0 else cell.rjust(width)


def flat(rows: list[dict]) -> dict[str, float]:
    """Return {"final/trained/knn/top1": value, ...} of all rows."""
    return {
        f"final/{row['features'].replace(' ', '_')}/{key}": float(value)
        for row in rows
        for key, value in row.items()
        if key != "features"
    }
