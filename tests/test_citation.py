"""CITATION.cff is of this version, and names every paper of README's systems."""

import re

import pytest

import vitssl
from tests import runs

yaml = pytest.importorskip("yaml")


def test_the_citation_is_of_this_software_and_of_the_papers_of_its_systems():
    said = yaml.safe_load((runs.ROOT / "CITATION.cff").read_text())
    assert said["cff-version"] == "1.2.0" and said["type"] == "software"
    assert (said["version"], said["license"]) == (vitssl.__version__, "Apache-2.0")
    assert said["authors"] == [{"name": "The vitssl authors"}] and said["message"]
    urls = [one["url"] for one in said["references"]]
    assert len(set(urls)) == len(urls)
    for one in said["references"]:
        assert {"type", "title", "authors", "year"} <= one.keys()
        # The first two digits of an arXiv number are the year.
        assert one["url"].startswith(f"https://arxiv.org/abs/{one['year'] % 100}")
    readme = (runs.ROOT / "README.md").read_text()
    systems = readme.partition("## Systems")[2].partition("\n## ")[0]
    papers = set(re.findall(r"arXiv:(\d{4}\.\d{5})", systems))
    assert papers and papers <= {url.rpartition("/")[2] for url in urls}
