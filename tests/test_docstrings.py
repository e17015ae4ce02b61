"""Docstrings of public names: each is there, and names its arguments and the errors that it raises itself.

The page of the API says what is public. That words are right nobody can test; that none is missing, this does.
"""

import ast
import enum
import importlib
import inspect
import re
import textwrap

import pytest
from written import ROOT

PAGE = (ROOT / "docs" / "api.md").read_text("utf-8")
LISTED = re.findall(r"^::: ([\w.]+)(\n    options: \{members: false\})?", PAGE, flags=re.MULTILINE)
# Of nn.Module, called by torch: mkdocs.yml leaves them out as well.
OF_TORCH = {"extra_repr", "get_extra_state", "set_extra_state"}


def found(path):
    parts = path.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        try:
            owner = importlib.import_module(".".join(parts[:cut]))
        except ImportError:
            continue
        for part in parts[cut:]:
            owner = getattr(owner, part)
        return owner
    raise AssertionError(path)


def methods(owner):
    """Public methods and properties of a class and of its bases in seedtriton, as functions."""
    for name in sorted(set(dir(owner)) - OF_TORCH):
        raw = inspect.getattr_static(owner, name)
        function = raw.fget if isinstance(raw, property) else getattr(raw, "__func__", raw)
        ours = inspect.isfunction(function) and function.__module__.startswith("seedtriton")
        if ours and not name.startswith("_"):
            yield name, function


def callables():
    for path, alone in LISTED:
        subject = found(path)
        if inspect.isfunction(subject):
            yield path, subject, subject.__doc__
        elif inspect.isclass(subject):
            # A class says in its own words, or in those of its constructor, what it is made of.
            yield path, subject, f"{subject.__doc__ or ''} {subject.__init__.__doc__ or ''}"
            if not alone and not issubclass(subject, enum.Enum):
                for name, function in methods(subject):
                    yield f"{path}.{name}", function, function.__doc__


CALLABLES = list(callables())


def arguments(subject):
    if inspect.isclass(subject) and issubclass(subject, (enum.Enum, Exception)):
        return []
    parameters = inspect.signature(subject).parameters.values()
    any_number = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    taken = [p.name for p in parameters if p.kind not in any_number or p.name not in ("args", "kwargs")]
    return [name for name in taken if name not in ("self", "cls")]


def unnamed(names, docstring):
    """Those that it does not name; a ``state`` may be named by the ``state_dict`` that made it."""
    return [name for name in names if not re.search(rf"\b{name}(_dict)?\b", docstring)]


def raised(subject):
    """The package's errors that a function raises itself."""
    if inspect.isclass(subject):
        makers = [vars(subject).get(name) for name in ("__init__", "__post_init__")]
        written = [each for each in makers if inspect.isfunction(each) and "seedtriton" in each.__code__.co_filename]
        return [] if issubclass(subject, Exception) else sorted({name for maker in written for name in raised(maker)})
    tree = ast.parse(textwrap.dedent(inspect.getsource(subject)))
    calls = [node.exc for node in ast.walk(tree) if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)]
    names = {call.func.id for call in calls if isinstance(call.func, ast.Name)}
    return sorted(name for name in names if name.endswith("Error"))


@pytest.mark.parametrize("path, subject, docstring", CALLABLES, ids=[path for path, _, _ in CALLABLES])
def test_a_public_name_says_what_it_takes_and_what_it_raises(path, subject, docstring):
    assert docstring
    assert docstring.strip()
    assert unnamed(arguments(subject), docstring) == []
    assert unnamed(raised(subject), docstring) == []


def test_there_are_many_and_the_search_can_fail():
    paths = {path for path, _, _ in CALLABLES}
    assert len(paths) > 120
    assert {"seedtriton.GrowthController.probe", "seedtriton.GradientMonitor.read", "seedtriton.load_grown"} <= paths

    def taught(first, second_name):
        """Takes first."""
        raise ValueError("always")

    assert unnamed(arguments(taught), taught.__doc__) == ["second_name"]
    assert unnamed(raised(taught), taught.__doc__) == ["ValueError"]
    assert unnamed(["state"], "Saved by ``state_dict``.") == []


TENSORS = [(path, subject, words) for path, subject, words in CALLABLES if not inspect.isclass(subject)]


@pytest.mark.parametrize("path", ["seedtriton.ops.segmented_sumsq", "seedtriton.GradientMonitor.clip_grad_norm_"])
def test_what_returns_a_tensor_says_its_dtype_and_shape(path):
    words = next(words for name, _, words in TENSORS if name == path)
    assert re.search(r"float(32|64)", words)
    assert re.search(r"0-dim|\[num_segments\]", words)
