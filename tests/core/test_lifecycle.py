"""Nine stages, one table: what it allows happens, what it does not leaves everything as it was."""

import pickle
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

import seedtriton
from seedtriton.core.errors import ConfigurationError, SeedtritonError, StateDictError, TransitionError
from seedtriton.core.lifecycle import FORWARD, HISTORY_LIMIT, TRANSITIONS, Lifecycle, Stage, diagram, stage_named

# Written by hand from the rules of the life cycle, not from the source.
ALLOWED = {
    "DORMANT": ["GERMINATED"],
    "GERMINATED": ["TRAINING", "PRUNED"],
    "TRAINING": ["BLENDING", "PRUNED"],
    "BLENDING": ["HOLDING", "PRUNED"],
    "HOLDING": ["BLENDING", "FOSSILIZED", "PRUNED"],
    "FOSSILIZED": [],
    "PRUNED": ["EMBARGOED"],
    "EMBARGOED": ["RESETTING"],
    "RESETTING": ["DORMANT"],
}
VALUES = {
    "DORMANT": 1,
    "GERMINATED": 2,
    "TRAINING": 3,
    "BLENDING": 4,
    "HOLDING": 6,
    "FOSSILIZED": 7,
    "PRUNED": 8,
    "EMBARGOED": 9,
    "RESETTING": 10,
}
ROUND = [
    Stage.GERMINATED,
    Stage.TRAINING,
    Stage.PRUNED,
    Stage.EMBARGOED,
    Stage.RESETTING,
    Stage.DORMANT,
]


def lifecycle_in(stage):
    """A life cycle that came to ``stage`` by allowed moves, one epoch in each."""
    paths = {
        "DORMANT": [],
        "GERMINATED": ["GERMINATED"],
        "TRAINING": ["GERMINATED", "TRAINING"],
        "BLENDING": ["GERMINATED", "TRAINING", "BLENDING"],
        "HOLDING": ["GERMINATED", "TRAINING", "BLENDING", "HOLDING"],
        "FOSSILIZED": ["GERMINATED", "TRAINING", "BLENDING", "HOLDING", "FOSSILIZED"],
        "PRUNED": ["GERMINATED", "PRUNED"],
        "EMBARGOED": ["GERMINATED", "PRUNED", "EMBARGOED"],
        "RESETTING": ["GERMINATED", "PRUNED", "EMBARGOED", "RESETTING"],
    }
    life = Lifecycle()
    for name in paths[stage]:
        life.move(Stage[name])
        life.tick()
    return life


def test_stages_and_their_values_are_stable():
    assert {stage.name: stage.value for stage in Stage} == VALUES


def test_the_reserved_value_5_is_no_stage():
    with pytest.raises(ValueError, match="5 is not a valid Stage"):
        Stage(5)
    for name in ALLOWED:
        assert not lifecycle_in(name).can_move(5)
        with pytest.raises(TransitionError):
            lifecycle_in(name).move(5)


def test_a_stage_is_written_by_its_name():
    assert str(Stage.TRAINING) == f"{Stage.TRAINING}" == "TRAINING"


@pytest.mark.parametrize("target", ALLOWED)
@pytest.mark.parametrize("source", ALLOWED)
def test_every_pair_of_stages(source, target):
    life = lifecycle_in(source)
    before = life.state_dict()
    assert life.stage is Stage[source]
    assert life.can_move(Stage[target]) is (target in ALLOWED[source])
    if target in ALLOWED[source]:
        life.move(Stage[target], "told to")
        assert life.stage is Stage[target]
        assert life.epochs_in_stage == 0
        assert life.epochs_total == before["epochs_total"]
        assert life.history[:-1] == before["history"]
        assert life.history[-1] == {
            "source": source,
            "target": target,
            "epochs_in_source": before["epochs_in_stage"],
            "epoch": before["epochs_total"],
            "reason": "told to",
            "initiator": "script",
        }
        return
    with pytest.raises(TransitionError) as caught:
        life.move(Stage[target], "told to")
    assert life.state_dict() == before
    assert (caught.value.source, caught.value.target) == (source, target)
    assert sorted(caught.value.allowed) == sorted(ALLOWED[source])
    for name in (source, target, *ALLOWED[source]):
        assert name in str(caught.value)


def test_the_error_says_that_a_terminal_stage_is_terminal():
    with pytest.raises(TransitionError, match="terminal") as caught:
        lifecycle_in("FOSSILIZED").move(Stage.PRUNED)
    assert caught.value.allowed == ()


def test_every_stage_has_a_row_and_fossilized_is_terminal_in_writing():
    assert list(TRANSITIONS) == list(Stage)
    assert [stage for stage in Stage if not TRANSITIONS[stage]] == [Stage.FOSSILIZED]


def test_the_tables_cannot_be_changed():
    with pytest.raises(TypeError):
        TRANSITIONS[Stage.FOSSILIZED] = frozenset({Stage.PRUNED})
    with pytest.raises(TypeError):
        FORWARD[Stage.FOSSILIZED] = Stage.PRUNED


def test_every_stage_but_fossilized_has_a_forward_move_of_the_table():
    assert set(FORWARD) == set(Stage) - {Stage.FOSSILIZED}
    for source, target in FORWARD.items():
        assert target.name in ALLOWED[source.name]


def test_forward_leads_a_seed_from_dormant_to_fossilized_and_a_pruned_one_back():
    walked = [Stage.DORMANT]
    while walked[-1] in FORWARD and len(walked) < 20:
        walked.append(FORWARD[walked[-1]])
    assert [str(stage) for stage in walked] == [
        "DORMANT", "GERMINATED", "TRAINING", "BLENDING", "HOLDING", "FOSSILIZED",
    ]  # fmt: skip
    for source, target in pairwise([Stage.PRUNED, Stage.EMBARGOED, Stage.RESETTING, Stage.DORMANT]):
        assert FORWARD[source] is target


def test_a_life_cycle_begins_dormant_with_nothing_counted():
    life = Lifecycle()
    assert (life.stage, life.epochs_in_stage, life.epochs_total, life.history) == (Stage.DORMANT, 0, 0, [])


def test_tick_counts_in_the_stage_and_in_total():
    life = Lifecycle()
    life.tick()
    life.move(Stage.GERMINATED)
    life.tick()
    life.tick()
    assert (life.epochs_in_stage, life.epochs_total) == (2, 3)
    assert life.stage is Stage.GERMINATED


def test_history_keeps_the_last_100_moves():
    life = Lifecycle()
    for number in range(250):
        life.move(ROUND[number % len(ROUND)], f"move {number}")
        assert len(life.history) == min(number + 1, 100)
    assert HISTORY_LIMIT == 100
    assert [entry["reason"] for entry in life.history] == [f"move {number}" for number in range(150, 250)]


def test_a_refused_move_leaves_a_full_history_alone():
    life = Lifecycle()
    for number in range(120):
        life.move(ROUND[number % len(ROUND)])
    before = life.state_dict()
    with pytest.raises(TransitionError):
        life.move(Stage.FOSSILIZED)
    assert life.state_dict() == before


def test_a_move_by_number_is_refused_or_leads_to_a_real_stage():
    """2 == Stage.GERMINATED; a plain 2 in its place makes a checkpoint that cannot be loaded."""
    life = Lifecycle()
    try:
        life.move(2)
    except (TransitionError, ConfigurationError, TypeError):
        assert life.state_dict() == Lifecycle().state_dict()
    assert isinstance(life.stage, Stage)
    Lifecycle().load_state_dict(life.state_dict())


def test_a_saved_state_does_not_follow_the_life_cycle():
    life = lifecycle_in("TRAINING")
    saved = life.state_dict()
    life.history[0]["reason"] = "changed"
    life.move(Stage.PRUNED)
    assert saved == lifecycle_in("TRAINING").state_dict()


def test_the_diagram_has_exactly_the_moves_of_the_table():
    head, *lines = diagram().splitlines()
    moves = [tuple(line.strip().split(" --> ")) for line in lines]
    expected = [(source, target) for source, targets in ALLOWED.items() for target in targets]
    assert head == "stateDiagram-v2"
    assert sorted(moves) == sorted([*expected, ("[*]", "DORMANT"), ("FOSSILIZED", "[*]")])


def test_a_transition_error_survives_pickling():
    error = TransitionError("TRAINING", "FOSSILIZED", ["BLENDING", "PRUNED"])
    copied = pickle.loads(pickle.dumps(error))
    assert type(copied) is TransitionError
    assert (copied.source, copied.target, copied.allowed) == ("TRAINING", "FOSSILIZED", ("BLENDING", "PRUNED"))
    assert str(copied) == str(error)


def test_errors_can_be_caught_by_what_python_users_expect():
    assert issubclass(ConfigurationError, ValueError)
    assert issubclass(StateDictError, ValueError)
    assert issubclass(TransitionError, RuntimeError)
    for error in (ConfigurationError, StateDictError, TransitionError):
        assert issubclass(error, SeedtritonError)


def test_stages_are_found_by_name_and_an_unknown_name_is_told_with_the_known_ones():
    assert stage_named("HOLDING") is Stage.HOLDING
    with pytest.raises(StateDictError, match=r"'GROWING'.*HOLDING"):
        stage_named("GROWING")


def test_the_core_imports_nothing_but_the_standard_library():
    """A stub stands in for the package, whose ``__init__`` imports torch."""
    code = """
import pathlib, sys, types
before = set(sys.modules)
package = types.ModuleType("seedtriton")
package.__path__ = [sys.argv[1]]
sys.modules["seedtriton"] = package
import importlib
for path in pathlib.Path(sys.argv[1], "core").glob("[!_]*.py"):
    importlib.import_module("seedtriton.core." + path.stem)
assert "torch" not in sys.modules
tops = {name.partition(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)
assert tops == {"seedtriton"}, tops
rooms = {name.removeprefix("seedtriton.") for name in sys.modules if name.startswith("seedtriton.")}
assert rooms == {"core", *("core." + path.stem for path in pathlib.Path(sys.argv[1], "core").glob("[!_]*.py"))}, rooms
"""
    folder = Path(seedtriton.__file__).parent
    done = subprocess.run(
        [sys.executable, "-I", "-c", code, str(folder)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
