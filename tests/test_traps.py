"""What goes wrong in `torch.distributed.pipelining` (measured on 2.13), and which tests hold that it does not here.

A line names a test as `file::function`, or a case of tests/end_to_end/cases.py as `case name`. Each case is trained
with every family of schedules, its backward in one piece and in halves, on threads and on processes, and compared in
every bit (tests/end_to_end/test_equality.py); each model of tests/split is called as a pipe, and trained on threads.
"""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

from tests.end_to_end.cases import CASES

TESTS = Path(__file__).parent

CUTTING = {
    "in-place write first thing in a stage, on the received value": """
        case in place
        split/test_in_place.py::test_first_thing_on_the_received_value
        split/test_seed.py::test_seed_trains
    """,
    "in-place write on a value that an earlier or later stage also uses, through a view too": """
        case in place
        split/test_in_place.py::test_value_that_the_earlier_stage_goes_on_to_use_elsewhere
        split/test_in_place.py::test_written_in_stage_1_read_in_stages_1_and_3
        split/test_in_place.py::test_through_a_view_made_before_the_cut
        split/test_in_place.py::test_base_written_and_the_view_read_later
        split/test_random_models.py::test_pipe_equals_the_model_or_is_refused
    """,
    "value used by stages 1 and 2; skip from 0 to 2 under interleaved and zero-bubble schedules": """
        case skips
        end_to_end/test_equality.py::test_every_number_of_microbatches_on_threads
        end_to_end/test_random_schedules.py::test_any_legal_schedule
    """,
    "model input used in another order than declared, or keywords given in another order": """
        case arguments
        split/test_data_flow.py::test_inputs_used_in_another_order_and_given_in_another_order
    """,
    "model input used by a late stage, or by several": """
        case arguments
        case own loss
        run/test_processes.py::test_inputs_are_needed_only_where_they_are_used
        run/test_runner.py::test_the_gradient_of_an_input_that_every_microbatch_gets_whole
    """,
    "None, float, bool, str keywords; dict or nested inputs; dict, dataclass, ModelOutput, None, scalar outputs": """
        case python values
        case structured
        case own loss
        run/test_processes.py::test_none_is_a_value
        split/test_data_flow.py::test_python_values_among_the_arguments
        split/test_data_flow.py::test_nested_inputs
        split/test_data_flow.py::test_output
        split/test_microbatch.py::test_how_outputs_are_merged
    """,
    "output made by an early stage, used by the loss": """
        case early outputs
        split/test_data_flow.py::test_output_of_an_early_stage_only_used_by_the_loss
    """,
    "int, bool, complex tensors across a cut; non-contiguous, channels-last, expanded, zero-size; outputs too": """
        case kinds of tensors
        case early outputs
        split/test_data_flow.py::test_dtype_across_the_cut
        split/test_data_flow.py::test_layout_across_the_cut
        run/test_transport.py::test_every_layout_arrives_as_it_was_sent
        test_verify.py::test_convolutions_in_channels_last
    """,
    "same block called twice in a stage, in two stages, pipe_split() inside such a block": """
        case shared blocks
        run/test_tied.py::test_threads
        run/test_tied.py::test_processes
        split/test_modules.py::test_cut_inside_a_shared_block
        split/test_modules.py::test_cut_at_each_call_of_a_shared_block
    """,
    "tied weights across stages, inside a stage, and both at once": """
        case tied
        run/test_tied.py::test_threads
        run/test_tied.py::test_processes
        run/test_tied.py::test_training_keeps_the_tie_and_counts_it_once
        run/test_tied.py::test_training_on_processes_keeps_every_copy_equal
        run/test_parameters.py::test_the_runner_holds_each_parameter_once_and_those_of_the_user
    """,
    "stage without parameters; frozen first, middle, last stages; nothing is sent that nobody needs": """
        case no parameters
        case frozen first
        case frozen middle
        case frozen last
        case frozen all but the second
        run/test_runner.py::test_nothing_is_sent_back_that_nobody_needs
        run/test_tied.py::test_a_frozen_tied_parameter_has_no_gradient_and_costs_no_transfer
        split/test_modes.py::test_parameters_frozen_and_thawed_after_the_capture
    """,
    "branch on x.shape, Python counters, .item() in the trunk": """
        run/test_paths.py::test_counters_shapes_and_numbers_read_from_inputs_decide
        run/test_paths.py::test_a_mask_in_some_microbatches_only
        run/test_paths.py::test_a_mask_in_some_microbatches_only_on_processes
        run/test_paths.py::test_a_value_that_only_the_step_can_know_is_refused_where_it_is_read
        split/test_modes.py::test_each_way_of_reading_a_value_is_guarded
    """,
    "data-dependent control flow, hooks, isinstance, custom methods, pickle and deepcopy inside a block": """
        case blocks of one's own
        split/test_modules.py::test_data_dependent_control_flow_in_blocks
        split/test_modules.py::test_hooks_of_blocks_run
        split/test_modules.py::test_block_that_copies_and_pickles_itself
        split/test_modules.py::test_method_other_than_forward_of_a_submodule
    """,
    "eval() after the capture of a model with dropout; train() again": """
        end_to_end/test_training.py::test_eval_mode_in_the_middle_switches_dropout_off_and_on_again
        run/test_tied.py::test_modes_and_values_of_a_tied_module_are_followed
        split/test_modes.py::test_eval_and_train_again_with_dropout
    """,
    "autocast around the step, inside forward, between cuts": """
        test_verify.py::test_autocast_inside_and_around
        run/test_runner.py::test_autocast_around_the_step
        run/test_processes.py::test_autocast_dtypes_input_gradients_and_seed
        split/test_modes.py::test_autocast_inside_forward_and_between_cuts
    """,
    "torch.utils.checkpoint in a block, around a block in the trunk, both kinds; memory is saved": """
        case checkpoints
        split/test_modules.py::test_checkpoint_in_a_block
        split/test_checkpoint.py::test_around_closed_modules
        split/test_checkpoint.py::test_around_calls_of_the_trunk
        split/test_checkpoint.py::test_cut_through_a_checkpoint
        split/test_draws.py::test_checkpoint_draws_the_same_mask_again
    """,
    "pipeline() twice on one model; the user's model afterwards": """
        run/test_runner.py::test_two_runners_on_one_model_and_the_model_itself
        split/test_capture.py::test_two_pipes_on_one_model
        split/test_capture.py::test_nothing_is_left_behind
    """,
    "cut before the first or after the last operation; a name never called; a cut inside a closed module": """
        split/test_errors.py::test_cut_that_cannot_be_made
        split/test_errors.py::test_pipe_split_before_the_first_and_after_the_last_operation
        split/test_errors.py::test_cut_inside_a_custom_function
    """,
    "meta device, then own stage only; non-persistent buffers, plain attributes, tensors made in __init__": """
        run/test_checkpoint.py::test_first_values_are_the_same_whatever_the_cut_and_the_ranks
        run/test_checkpoint.py::test_a_step_equals_that_of_the_model_that_was_saved
        run/test_checkpoint.py::test_what_no_file_holds_must_be_filled_in
        run/test_checkpoint.py::test_a_process_reads_its_own_tensors_only
        split/test_capture.py::test_constant_without_values_is_named
    """,
    "BatchNorm; buffers written and read in the same step by microbatches in flight": """
        case batch norm
        case buffers
        split/test_modules.py::test_batch_norm_shared_by_two_stages_is_refused
    """,
    "dropout and other random ops": """
        case dropout
        end_to_end/test_training.py::test_dropout_does_not_depend_on_cut_ranks_schedule_or_transport
        split/test_draws.py::test_same_numbers_wherever_the_cuts_are
    """,
}

STEPPING = {
    "batch not divisible by microbatches; a smaller last batch": """
        run/test_runner.py::test_a_batch_that_does_not_divide_is_refused_by_name_and_changes_nothing
        run/test_runner.py::test_a_smaller_last_batch_just_works
        run/test_processes.py::test_the_life_of_a_runner
        run/test_process_failures.py::test_another_batch_on_one_rank_is_refused_by_all
    """,
    "sequence length or batch changes between steps; eval with other shapes": """
        run/test_runner.py::test_other_shapes_are_captured_once_and_give_what_the_model_gives
        run/test_processes.py::test_the_life_of_a_runner
        end_to_end/test_training.py::test_adamw_with_clipping_for_several_steps
    """,
    "padded labels: the mean of means": """
        run/test_loss_weight.py::test_as_the_unsplit_model_microbatch_by_microbatch
        run/test_loss_weight.py::test_padded_labels_as_in_the_whole_batch
        run/test_loss_weight.py::test_processes
    """,
    "several step() before the optimizer": """
        run/test_runner.py::test_steps_accumulate_1_2_3
        run/test_processes.py::test_the_life_of_a_runner
    """,
    "evaluate() after step()": """
        run/test_runner.py::test_evaluate_leaves_gradients_steps_and_generator_alone
        run/test_processes.py::test_the_life_of_a_runner
    """,
    "gradient of the model's input": """
        run/test_runner.py::test_the_gradient_of_the_input
        run/test_runner.py::test_the_gradient_of_an_input_that_every_microbatch_gets_whole
        run/test_processes.py::test_autocast_dtypes_input_gradients_and_seed
    """,
    "clip_grad_norm_": """
        run/test_parameters.py::test_clipping_is_torchs_own
        run/test_parameters.py::test_clipping_counts_tied_and_foreign_named_parameters
        run/test_processes.py::test_the_life_of_a_runner
        end_to_end/test_training.py::test_adamw_with_clipping_for_several_steps
    """,
    "loss given on the last rank only; targets that are dicts; no target": """
        run/test_processes.py::test_a_loss_is_needed_on_the_last_rank_only
        run/test_runner.py::test_targets_are_trees
        run/test_runner.py::test_no_loss_at_all_is_refused
        case structured
        case own loss
    """,
    "other schedule, other number of microbatches, other cut on one rank": """
        run/test_processes.py::test_ranks_that_mean_different_things_hear_of_it_before_a_tensor_moves
        run/test_process_failures.py::test_a_step_on_one_rank_and_an_evaluation_on_another
    """,
    "an exception on one rank, caught or not; a killed rank": """
        run/test_failures.py::test_a_failure_on_one_rank_ends_all_and_the_next_step_works
        run/test_process_failures.py::test_a_stage_that_raises_ends_the_step_on_every_rank
        run/test_process_failures.py::test_a_killed_process_is_heard_of_by_the_others
    """,
    "zero-bubble: weight used twice on the path, stage output a view, a module called twice": """
        run/test_backward.py::test_whatever_a_block_does_with_its_weights
        run/test_backward.py::test_whatever_is_done_to_a_model
        case shared blocks
        case tied
    """,
    "float16 or bfloat16 output where float32 was expected, stale buffers": """
        run/test_failures.py::test_a_stage_that_makes_something_else_than_announced_is_refused
        run/test_process_failures.py::test_a_tensor_that_was_not_announced_reaches_nobody
    """,
    "optimizer state and parameters from 2 stages loaded into 4, 3, 1": """
        end_to_end/test_training.py::test_optimizer_state_goes_from_one_cut_to_another
        run/test_parameters.py::test_state_dicts_go_from_any_cut_to_any_other
        run/test_processes.py::test_state_dicts_of_the_ranks_make_one
    """,
    "1 microbatch; fewer microbatches than ranks": """
        end_to_end/test_equality.py::test_every_number_of_microbatches_on_threads
        end_to_end/test_equality.py::test_numbers_of_microbatches_on_processes
        plan/test_families.py::test_the_smallest_number_of_microbatches
    """,
}


@cache
def functions(file: str) -> frozenset[str]:
    body = ast.parse((TESTS / file).read_text()).body
    return frozenset(node.name for node in body if isinstance(node, ast.FunctionDef))


@pytest.mark.parametrize("trap", [*CUTTING, *STEPPING])
def test_each_is_held(trap: str) -> None:
    lines = [line.strip() for line in (CUTTING | STEPPING)[trap].strip().splitlines()]
    assert lines
    for line in lines:
        if line.startswith("case "):
            assert line.removeprefix("case ") in CASES
        else:
            file, name = line.split("::")
            assert name in functions(file), line
