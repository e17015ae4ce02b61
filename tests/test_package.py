"""What stands around the code: one version, files that people look for, extras that exist, pins of what is tested."""

import re

import pytest
import yaml
from written import ROOT

import seedtriton

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
PINS = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text("utf-8"), flags=re.MULTILINE))


def plain(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def test_there_is_one_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert seedtriton.__version__ == PROJECT["version"] == citation["version"]
    assert citation["license"] == PROJECT["license"]
    newest = re.search(r"^## (\S+) \((\S+)\)$", (ROOT / "CHANGELOG.md").read_text("utf-8"), flags=re.MULTILINE)
    assert newest[1] == seedtriton.__version__
    assert newest[2] == "unreleased" or re.fullmatch(r"\d{4}-\d\d-\d\d", newest[2])


@pytest.mark.parametrize("extra", PROJECT["optional-dependencies"])
def test_what_an_extra_installs_is_pinned(extra):
    """An extra without pins is a CI that changes by itself."""
    for wanted in PROJECT["optional-dependencies"][extra]:
        name = re.match(r"[\w.-]+", wanted)[0]
        if name != "seedtriton":
            assert plain(name) in {plain(pin) for pin in PINS}, wanted


def test_templates_of_issues_ask_for_what_a_report_needs():
    folder = ROOT / ".github" / "ISSUE_TEMPLATE"
    forms = {path.stem: yaml.safe_load(path.read_text("utf-8")) for path in folder.glob("*.yml")}
    assert forms.keys() == {"bug", "wrong-verdict", "question", "config"}
    for name in forms.keys() - {"config"}:
        assert {"name", "description", "body"} <= forms[name].keys(), name
        assert all(part["type"] in ("markdown", "textarea", "input", "checkboxes") for part in forms[name]["body"])
    for name in ("bug", "wrong-verdict"):
        assert "python -m seedtriton doctor" in str(forms[name])
    assert "str(verdict)" in str(forms["wrong-verdict"]) or "print(verdict)" in str(forms["wrong-verdict"])


def test_there_is_a_way_to_report_what_is_dangerous():
    text = (ROOT / "SECURITY.md").read_text("utf-8")
    assert "weights_only=True" in text
    assert seedtriton.__version__.rpartition(".")[0] in text
