"""Every answer that asks for a hand has its cause and its cure, and no advice is of an answer that nobody gives."""

import ast
import dataclasses
import itertools
import pathlib
import random

import pytest

import seedtriton.core as core
from seedtriton import (
    GateThresholds,
    ProgressThreshold,
    QualityGates,
    SeedEvidence,
    SeedStatus,
    Stage,
)
from seedtriton.core.advice import ADVICE
from seedtriton.core.evidence import STATUSES
from seedtriton.core.gates import GATE_OF
from seedtriton.core.harm import Watch
from seedtriton.core.probe import BlendProbe
from seedtriton.core.verdict import WARNINGS

EVERYTHING = GateThresholds(
    min_training_improvement=1.0, max_vanishing_share=0.1, max_exploding_share=0.1, min_health=0.5
)
PROGRESSING = dataclasses.replace(EVERYTHING, min_gradient_ratio=ProgressThreshold(early=0.1, mid=0.2, late=0.3))
NUMBERS = (None, 0.0, 0.5, 1e6)


def a_status(draw):
    evidence = SeedEvidence(
        seed="s", status=draw(STATUSES), frozen=draw((True, False)), samples=draw((0, 5, 100)), dropped=draw((0, 50)),
        seed_not_finite=draw((0, 1)),
        **{name: draw(NUMBERS) for name in ("ratio", "rms_ratio", "displacement", "plateau_share")},
        **{name: draw((None, 0.0, 1.0)) for name in ("live_share", "vanishing_share", "exploding_share", "health")},
        blend_gain_t=draw((None, -9.0, 9.0)), age=draw((None, 0, 99)), idle=draw((None, 99)),
        in_optimizer=draw((None, True, False)), optimizer_steps=draw((None, 0, 9)),
    )  # fmt: skip
    probe = BlendProbe(
        seed="s", loss=1.0, alphas=(0.1, 1.0), changes=draw(((0.5, 0.5), (-0.5, -0.5), (0.0, 0.0))),
        errors=draw((None, (0.01, 0.01))), spread=1.0,
    )  # fmt: skip
    return SeedStatus(
        seed="s", stage=draw(tuple(Stage)), epochs_in_stage=draw((0, 9)), parameters=draw((0, 9)),
        preserves_shape=draw((None, True, False)), evidence=draw((None, evidence, evidence, evidence)),
        improvement=draw((None, 0.0)), accuracy_change=draw((None, 0.0, -9.0)), loss_rise=draw((None, 9.0)),
        isolation_violations=draw((0, 9)), handed_on=draw((0.0, 1.0)), alpha=draw((0.0, 0.5)),
        probe=draw((None, probe)), probe_due=draw((None, 7)), watch=draw((None, Watch(above=1))),
        progress=draw((None, 0.5)),
    )  # fmt: skip


def names_given(rounds=400):
    draw = random.Random(0).choice
    found = set()
    for _, limits, target in itertools.product(range(rounds), (EVERYTHING, PROGRESSING), GATE_OF):
        verdict = QualityGates(limits).judge(target, a_status(draw))
        found |= {check.name for check in (*verdict.failed, *verdict.warnings)}
    return found


def test_every_refusal_and_every_warning_has_its_advice_and_no_other_has():
    found = names_given()
    assert found >= WARNINGS
    assert found == ADVICE.keys()


@pytest.mark.parametrize("name", ADVICE)
def test_advice_is_of_an_answer_that_the_gates_give_and_in_whole_sentences(name):
    source = "".join(
        (pathlib.Path(core.__file__).parent / f"{file}.py").read_text("utf-8")
        for file in ("gates", "questions", "verdict")
    )
    literals = {node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant)}
    assert name in literals or name.removesuffix("_never_measured") in literals
    assert all(words.endswith(".") for words in ADVICE[name])
