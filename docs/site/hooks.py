"""What becomes of the repository's pages elsewhere: on the site, and in the package.

mkdocs calls the functions `on_*`, hatchling the class at the end.
"""

import pathlib
import posixpath
import re

try:
    from hatchling.metadata.plugin.interface import MetadataHookInterface
except ImportError:  # Who builds the site need not build packages.
    MetadataHookInterface = object

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Pages that do not lie in docs/.
PAGES = {
    "README.md": "index.md",
    "configs/README.md": "recipes.md",
    "launch/README.md": "launch.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changes.md",
}
# What the page of the Python interface shows.
PYTHON = {
    "In a notebook": (
        "vitssl.load",
        "vitssl.run.inference.Features",
        "vitssl.train",
        "vitssl.normalise_sensors",
    ),
    "Weights of others": (
        "vitssl.convert.importer.read",
        "vitssl.convert.exporter.write",
        "vitssl.convert.backbone.Backbone",
        "vitssl.convert.backbone.read",
        "vitssl.convert.backbone.write",
        "vitssl.run.opened.past",
        "vitssl.run.opened.Past",
    ),
    "Configs and errors": ("vitssl.config", "vitssl.ranges", "vitssl.errors"),
    "To add to": (
        "vitssl.methods.base.Method",
        "vitssl.evals.evaluator.Evaluator",
        "vitssl.data.sources.layout.Source",
        "vitssl.models.Backbone",
    ),
}
_LINK = re.compile(
    r"```.*?```|(?P<mark>!?)\[(?P<label>[^\]]*)\]"
    r"\((?!\w+:|#)(?P<target>[^)\s]+)\)|`[^`]*`",
    re.S,
)


def relinked(text: str, to) -> str:
    """Return a page with other targets of the links to files of the repository.

    Args:
        to: old target -> new one; of "" the label alone stays.
    """

    def one(found):
        if not found["target"]:  # Code.
            return found[0]
        target = to(found["target"])
        label = found["label"]
        return f"{found['mark']}[{label}]({target})" if target else label

    return _LINK.sub(one, text)


def on_files(files, config):
    """Add the pages that do not lie in docs/, and the pictures they show."""
    from mkdocs.structure.files import File

    for path, page in PAGES.items():
        text = (ROOT / path).read_text()
        files.append(File.generated(config, page, content=text))
    lines = ["# Python"]
    for heading, names in PYTHON.items():
        lines += [f"## {heading}", *(f"::: {name}" for name in names)]
    files.append(File.generated(config, "api.md", content="\n\n".join(lines)))
    for path in sorted((ROOT / "configs/evidence").glob("*.png")):
        place = f"evidence/{path.name}"
        files.append(File.generated(config, place, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Lead the links of a page to other pages of the site."""
    del config, files
    origins = {place: path for path, place in PAGES.items()}
    source = origins.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    return relinked(markdown, lambda target: _on_the_site(source, target))


def _on_the_site(source, target) -> str:
    """Return where a link of a page leads on the site; "" = to nothing there."""
    path, mark, anchor = target.partition("#")
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
    folder, name = posixpath.split(path)
    if folder == "configs/evidence":
        return f"evidence/{name}"
    if path in PAGES:
        return PAGES[path] + mark + anchor
    return name + mark + anchor if folder == "docs" else ""


class Readme(MetadataHookInterface):
    """Gives the package README.md, whose links would lead nowhere on an index."""

    def update(self, metadata):
        """Set the field `readme`."""
        text = (pathlib.Path(self.root) / "README.md").read_text("utf-8")
        text = relinked(text, lambda target: "")
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
