"""Every known trap of a training loop, and the tests that fail when somebody falls into it again.

A trap that is not tested as a whole says what is missing: a second process, which belongs to the work on distributed
training, or a second device.
"""

import ast
import pathlib
import re
from typing import NamedTuple

import pytest
import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
CASES, GPU = "kernels/kernel_cases.py", "kernels/gpu/test_gpu_kernels.py"
LIBRARY, PLAN = "kernels/interpreter/test_interpreted_library.py", "kernels/test_plan.py"
EVIDENCE, GATES, STATES = "core/test_evidence.py", "core/test_gates.py", "core/test_states.py"
LOOPS, MONITOR, TRAINING = (f"gradients/test_{name}.py" for name in ("loops", "monitor", "monitor_training"))
FLAT, OPS, BACKEND = (f"gradients/test_{name}.py" for name in ("flat", "ops", "backend"))
GROWTH, SLOT = "growth/test_controller.py", "growth/test_slot.py"
DISTRIBUTED = "needs a second process: the work on distributed training"


class Trap(NamedTuple):
    number: int
    name: str
    tests: dict[str, tuple[str, ...]]  # by file, below tests/
    missing: str = ""


TRAPS = (
    Trap(1, "measured after zero_grad", {
        LOOPS: ("test_measured_only_after_zero_grad_is_told_once_with_the_right_place",),
        GATES: ("test_measuring_after_zero_grad_is_refused_and_says_why",),
    }),
    Trap(2, "never wired at all", {
        GROWTH: ("test_not_calling_measure_makes_the_gate_say_so",),
        LOOPS: ("test_strict_reading_raises_when_nothing_was_measured",),
    }),
    Trap(3, "zeros for None look measured", {
        MONITOR: ("test_never_measured_no_gradient_not_finite_undefined_and_zero_are_different",),
        CASES: ("test_live_counts_tensors_that_are_not_all_zero",),
    }),
    Trap(4, "seed in no optimizer", {
        GROWTH: ("test_a_seed_that_cannot_learn_is_refused_with_its_reason",),
        MONITOR: ("test_membership_is_of_every_parameter_that_requires_grad",),
    }),
    Trap(5, "learning rate 0, frozen seed", {
        GROWTH: ("test_a_seed_that_cannot_learn_is_refused_with_its_reason",),
        TRAINING: ("test_nothing_that_moves_is_not_called_clipping",),
    }),
    Trap(6, "frozen host", {
        EVIDENCE: ("test_a_frozen_host_leaves_the_ratio_undefined", "test_the_floor_of_the_host_norm_is_exact"),
        GATES: ("test_behind_a_frozen_host_the_blend_gain_decides",),
    }),
    Trap(7, "seed without parameters", {MONITOR: ("test_an_empty_seed_is_refused",)}),
    Trap(8, "output that starts at zero", {
        GROWTH: ("test_a_seed_whose_last_layer_starts_at_zero_is_not_judged_by_its_first_steps",),
        MONITOR: ("test_displacement_of_weights_that_start_at_zero_has_a_floor",),
    }),
    Trap(9, "straight-through ratio far above 1", {
        GATES: ("test_the_upper_alarm_refuses_an_enormous_ratio",),
    }),
    Trap(10, "seed and host of different sizes", {
        EVIDENCE: ("test_the_rms_ratio_of_equal_intensities_is_one_whatever_the_size",),
        GATES: ("test_the_ratio_is_of_the_kind_that_the_thresholds_name",),
    }),
    Trap(11, "tied parameters", {
        MONITOR: ("test_tied_parameters_count_once", "test_seeds_that_overlap_are_refused_by_name"),
        GROWTH: ("test_a_seed_that_shares_parameters_with_the_host_is_refused",),
    }),
    Trap(12, "the host includes the seed", {
        MONITOR: ("test_seeds_inside_the_host_are_taken_out_by_identity",),
    }),
    Trap(13, "fp16 measured before unscale_", {
        LOOPS: ("test_loss_scaling_changes_no_number_and_the_skipped_step_is_dropped",),
        CASES: ("test_scales_and_found_inf",),
    }),
    Trap(14, "one optimizer unscaled, the other not", {
        LOOPS: ("test_one_optimizer_unscaled_and_the_other_not_is_dropped_and_told_once",),
    }),
    Trap(15, "we call unscale_ ourselves", {LOOPS: ("test_we_never_touch_the_scaler",)}),
    Trap(16, "fused optimizer under AMP", {
        LOOPS: (
            "test_fused_optimizers_are_measured_before_the_scaler_unscales_inside_the_step",
            "test_attach_measures_once_per_step_without_a_line_in_the_loop",
        ),
    }),
    Trap(17, "overflow step", {
        MONITOR: ("test_a_sample_that_is_not_finite_is_dropped_and_counted",),
        LOOPS: ("test_loss_scaling_changes_no_number_and_the_skipped_step_is_dropped",),
    }),
    Trap(18, "seed optimizer without gradients in scaler.step", {
        LOOPS: ("test_an_optimizer_without_gradients_is_not_stepped_and_the_scaler_goes_on",),
    }),
    Trap(19, "clipped apart before measuring", {
        TRAINING: (
            "test_gradients_clipped_apart_before_measuring_are_refused",
            "test_clipping_that_leaves_the_ratio_alone_is_not_refused",
            "test_clipping_by_value_is_not_seen_as_the_documentation_says",
        ),
    }),
    Trap(20, "partial micro-batch in accumulation", {
        LOOPS: (
            "test_several_backward_passes_before_a_step_are_one_sample_of_their_sum",
            "test_accumulation_under_no_sync_is_one_sample_of_the_sum",
        ),
    }),
    Trap(21, "hooks that fire before DDP's reduction", {
        FLAT: ("test_a_monitor_beside_ddp_measures_what_it_would_measure_without",),
    }, f"that the gradient is the reduced one {DISTRIBUTED}"),
    Trap(22, "no_sync, FSDP2 without gradient sync", {
        LOOPS: ("test_accumulation_under_no_sync_is_one_sample_of_the_sum",),
        EVIDENCE: ("test_an_empty_measurement_is_counted_and_not_averaged",),
    }, f"gradients of one rank alone: {DISTRIBUTED}"),
    Trap(23, "DTensor .item() and local shards", {}, DISTRIBUTED),
    Trap(24, "host DTensor, plain seed", {}, DISTRIBUTED),
    Trap(25, "replicated parameters counted often", {}, DISTRIBUTED),
    Trap(26, "empty local shard", {
        CASES: ("test_zero_size_tensors", "test_a_sample_of_empty_tensors_is_still_a_row"),
        OPS: ("test_only_empty_tensors_are_zeros",),
    }, f"the collective that must be joined: {DISTRIBUTED}"),
    Trap(27, "collective on some ranks only", {}, DISTRIBUTED),
    Trap(28, "ranks decide alone", {}, DISTRIBUTED),
    Trap(29, "graft after the wrap", {}, DISTRIBUTED),
    Trap(30, "gradients on several devices", {
        GPU: ("test_gradients_on_another_device_are_measured_too", "test_a_device_that_is_not_current"),
    }),
    Trap(31, "sparse gradients", {
        OPS: ("test_sparse_gradients_of_an_embedding_and_other_sparse_tensors",),
        LOOPS: ("test_channels_last_sparse_and_tied_gradients_are_measured_as_dense_ones",),
        LIBRARY: ("test_the_monitor_needs_one_launch_to_measure_and_one_to_clip_and_sees_what_eager_sees",),
    }),
    Trap(32, "channels_last, holes, expanded", {
        OPS: ("test_no_layout_changes_the_sum", "test_expanded_elements_count_as_often_as_they_appear"),
        LOOPS: ("test_channels_last_sparse_and_tied_gradients_are_measured_as_dense_ones",),
        CASES: (
            "test_dense_layouts_are_walked_in_storage_order",
            "test_a_layout_with_holes_at_a_known_address_is_refused",
        ),
    }),
    Trap(33, "unaligned bucket views", {
        CASES: ("test_sums_of_all_sizes_at_each_alignment", "test_unaligned_base_still_right"),
        LIBRARY: ("test_the_buckets_of_ddp_are_used_and_followed_when_ddp_lays_them_out_anew",),
    }),
    Trap(34, "mixed dtypes in one launch", {
        CASES: ("test_mixed_dtype_list_is_not_read_with_the_first_tensors_dtype",),
    }),
    Trap(35, "result in the gradients' dtype", {
        OPS: ("test_half_precision_lists_where_foreach_norm_is_wrong",),
        CASES: ("test_bf16_result_is_not_rounded",),
    }),
    Trap(36, "squares that overflow or vanish in fp32", {
        OPS: ("test_wide_lanes_neither_overflow_nor_vanish", "test_sums_of_sums_do_not_overflow_fp32"),
        MONITOR: ("test_wide_lanes_reach_far_magnitudes",),
    }),
    Trap(37, "more than 2**31 elements", {
        PLAN: ("test_more_than_2_31_elements_plan",),
        GPU: ("test_more_than_2_31_elements",),
    }),
    Trap(38, "order of atomics", {
        CASES: ("test_same_bits_on_every_grid_and_from_two_launches",),
        GPU: ("test_same_bits_1000_times",),
    }),
    Trap(39, ".item() in the step", {
        MONITOR: ("test_measuring_sends_nothing_to_the_host", "test_that_check_can_fail"),
        GPU: ("test_no_synchronisation",),
    }),
    Trap(40, "kept references to gradients", {
        MONITOR: ("test_it_keeps_no_gradient_alive",),
        CASES: ("test_tables_hold_no_gradient_and_are_bounded", "test_addresses_that_change_between_calls"),
    }),
    Trap(41, "pointer table copied in every step", {
        "kernels/test_uploads.py": ("test_a_staging_buffer_is_used_again_only_after_its_event",),
        LIBRARY: ("test_flat_gradients_upload_once_and_measure_the_same",),
        GPU: ("test_addresses_that_change_while_launches_are_queued",),
    }),
    Trap(42, "raw pointers in a CUDA graph", {
        CASES: (
            "test_an_upload_during_a_capture_names_the_tensor_that_moved",
            "test_tables_of_a_captured_graph_are_never_uploaded_to_again",
        ),
        LIBRARY: ("test_what_moved_before_a_capture_is_named_by_its_parameter",),
        GPU: ("test_eager_equals_cuda_graph", "test_what_moved_inside_a_capture_is_named_by_its_parameter"),
    }),
    Trap(43, "recompilation by alpha and stage", {
        SLOT: ("test_whole_alpha_ramp_costs_no_recompilation_and_a_stage_at_most_one",),
    }),
    Trap(44, "requires_grad toggled under compile", {
        LOOPS: ("test_freezing_under_a_compiled_measurement_is_seen",),
        MONITOR: ("test_parameters_frozen_and_thawed_after_construction",),
    }),
    Trap(45, "step hook before backward", {LOOPS: ("test_attach_refuses_a_closure_with_the_reason",)}),
    Trap(46, "a hook per optimizer", {LOOPS: ("test_attach_measures_once_per_step_without_a_line_in_the_loop",)}),
    Trap(47, "several losses in one step", {
        LOOPS: (
            "test_losses_of_different_tags_are_never_averaged_together",
            "test_a_tag_is_asked_for_by_both_sides_or_by_none",
        ),
    }),
    Trap(48, "torch.autograd.grad sets no p.grad", {
        LOOPS: ("test_gradients_of_a_functional_loop_are_measured_as_backwards_would_be",),
    }),
    Trap(49, "checkpoints that weights_only refuses", {
        MONITOR: ("test_a_state_survives_saving_with_identical_evidence",),
        SLOT: ("test_life_cycle_state_round_trips_through_a_weights_only_file",),
        STATES: ("test_an_object_comes_back_equal",),
    }),
    Trap(50, "extra_state in the host's module", {
        SLOT: ("test_a_checkpoint_without_slots_loads_strictly_into_a_model_with_empty_ones",),
        MONITOR: ("test_a_monitored_model_is_copied_pickled_and_saved_as_before",),
    }),
    Trap(51, "import triton taken for a GPU", {
        BACKEND: ("test_auto_on_a_cpu_is_torch_and_says_why",),
        "test_cli.py": ("test_doctor_names_versions_and_the_reason_for_the_backend",),
    }),
    Trap(52, "hard dependency on triton", {
        "test_traps.py": ("test_torch_is_the_only_dependency",),
        BACKEND: ("test_importing_and_using_it_on_a_cpu_loads_no_heavy_library",),
    }),
    Trap(53, "interpreter that is not on", {
        "kernels/interpreter/test_interpreted_kernels.py": ("test_the_interpreter_is_really_on",),
    }),
    Trap(54, "bf16 arithmetic in the interpreter", {
        CASES: ("test_half_precision_at_odd_alignments", "test_bf16_result_is_not_rounded"),
    }),
    Trap(55, "channels_last host and detach", {
        "growth/test_isolation.py": ("test_bit_identical_in_channels_last",),
    }),
    Trap(56, "two threads on a busy machine", {
        "test_traps.py": ("test_tests_demo_and_examples_run_on_one_thread",),
    }),
)  # fmt: skip


def tests_in(path):
    return {node.name for node in ast.parse(path.read_text("utf-8")).body if isinstance(node, ast.FunctionDef)}


def test_every_trap_is_in_the_table_once():
    assert [trap.number for trap in TRAPS] == list(range(1, 57))


@pytest.mark.parametrize("trap", TRAPS, ids=lambda trap: str(trap.number))
def test_the_tests_of_a_trap_exist(trap):
    assert trap.name
    assert trap.tests or trap.missing
    for file, names in trap.tests.items():
        assert names
        assert all(name.startswith("test_") for name in names)
        assert set(names) <= tests_in(ROOT / "tests" / file), file


def test_only_what_needs_a_second_process_is_missing():
    missing = {trap.number for trap in TRAPS if trap.missing}
    assert missing == {21, 22, 23, 24, 25, 26, 27, 28, 29}
    assert {trap.number for trap in TRAPS if not trap.tests} == {23, 24, 25, 27, 28, 29}
    assert all("needs a second process" in trap.missing for trap in TRAPS if trap.missing)


def test_torch_is_the_only_dependency():
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    (found,) = re.findall(r"^dependencies = \[(.*?)\]", text, flags=re.MULTILINE | re.DOTALL)
    assert re.findall(r'"([A-Za-z0-9_-]+)', found) == ["torch"]


def test_tests_demo_and_examples_run_on_one_thread():
    assert torch.get_num_threads() == 1
    for path in (ROOT / "seedtriton" / "demo.py", *(ROOT / "examples").glob("*.py")):
        assert "torch.set_num_threads(1)" in path.read_text("utf-8"), path.name
