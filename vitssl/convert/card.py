"""Model cards: what a file holds, where it comes from, how to load it."""

import json
import pathlib

from vitssl.convert import backbone, importer


def write(file: pathlib.Path, source: backbone.Backbone, layout, snippet, digest=True):
    """Write the card of a file beside it, as NAME.md; return its path; see `text`."""
    path = file.with_suffix(".md")
    path.write_text(text(file, source, layout, snippet, digest))
    return path


def text(file, source: backbone.Backbone, layout, snippet, digest=True) -> str:
    """Return the card in Markdown.

    Args:
        file: the exported file.
        source: what was exported.
        layout: its layout.
        snippet: lines that load it; {file} and {folder} are filled in.
        digest: read the file for its sha256; of an import that of its source is enough.
    """
    about = source.about
    code = snippet.replace("{file}", file.name).replace("{folder}", ".")
    data = about.config.get("data", {})
    facts = {
        "Parameters": f"{importer.size(source):,}",
        "Model": _inline(about.model),
        "Normalisation": f"mean {about.mean}, std {about.std} of pixels in [0, 1]",
        "Feature of an image": _POOLS[about.pool],
        "Family": about.family,
        "Source": about.source or "unknown",
        "sha256 of the source": about.sha256,
        "sha256 of this file": importer.digest(file) if digest else "",
        "Training data": _inline(
            {k: data[k] for k in ("source", "split") if k in data}
        ),
        "Scores": _inline(about.metrics),
    }
    rows = "\n".join(f"| {key} | {value} |" for key, value in facts.items() if value)
    notes = "\n".join(f"- {note}" for note in about.notes)
    parts = [
        f"# {file.stem}",
        f"Weights in the layout `{layout}`, written by vitssl.",
        f"| | |\n|---|---|\n{rows}",
        f"```python\n{code}```",
    ]
    if notes:
        parts.append(f"## What the conversion did\n\n{notes}")
    if about.config:
        settings = json.dumps(about.config, indent=1)
        parts.append(f"## Config of the run\n\n```json\n{settings}\n```")
    return "\n\n".join(parts) + "\n"


_POOLS = {
    "cls": "the class token after the last norm",
    "mean": "the mean of the patch tokens after the last norm",
}


def _inline(values) -> str:
    return ", ".join(f"{key}={value}" for key, value in dict(values).items())
