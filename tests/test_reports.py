"""A table of reported problems, from users and from comparable tools, with the present result and its tests.

Each row lists the tests that check the result; the tests of one area are in one file in this folder."""

import ast
from pathlib import Path

import pytest

INPUTS, RUNS, TRAINING, TUNING = (f"test_reports_{area}" for area in ("inputs", "runs", "training", "tuning"))
HOSTILE = "test_hostile"

REPORTS = {  # input: (present result, file, tests)
    "nulls of a pandas category label": (
        "rows without a label, as from a file",
        INPUTS,
        [
            "missing_labels_are_missing_from_a_frame_and_a_file",
            "nulls_of_a_category_label_are_not_the_last_category",
        ],
    ),
    "numeric categories, decimals, nullable integers": (
        "features, from frames and files alike",
        INPUTS,
        ["a_number_of_any_type_is_a_feature_in_a_frame_and_a_file"],
    ),
    "classes of which one is never predicted": (
        "pictures and scores of all classes of the config",
        TRAINING,
        ["classes_come_from_the_config_when_one_is_never_predicted"],
    ),
    "a fault after fitting: price file, full disk, plot, kill": (
        "a run that is not scored, which rescore finishes",
        TRAINING,
        [
            "no_fault_after_fitting_loses_the_weights",
            "a_run_whose_process_and_its_parent_are_killed_is_finished_by_rescore",
        ],
    ),
    "an edited network, a comment in plots": (
        "another identity if the code is imported to fit, otherwise the same",
        RUNS,
        ["an_identity_holds_the_code_that_fits_and_predicts_and_no_other"],
    ),
    "--set random_seed=7, classes, horizon": (
        "refused with the option that sets it",
        RUNS,
        ["a_key_that_the_task_decides_is_refused_with_its_option"],
    ),
    "two projects with data of one name, data that moved": (
        "absolute paths, data sets by fingerprint, --data",
        RUNS,
        [
            "paths_are_kept_whole",
            "two_projects_with_data_of_one_name_keep_their_runs",
            "data_that_moved_are_named_for_final_rescore_and_compare",
        ],
    ),
    "a NaN, zero or infinite close, a price file that is missing or of another time zone": (
        "refused before the fit with file, symbol and time",
        TRAINING,
        ["prices_that_cannot_be_traded_are_named_before_the_fit"],
    ),
    "stale closes, unadjusted splits, features in the thousands": (
        "warnings with symbol and time in check, run, grid and comparison",
        TRAINING,
        [
            "prices_that_cannot_be_right_are_named_with_symbol_and_time",
            "warnings_on_prices_and_classes_reach_check_run_grid_and_comparison",
        ],
    ),
    "bars of 1970": (
        "refused with the missing unit of the times",
        TRAINING,
        ["times_whose_unit_was_forgotten_are_refused_with_the_unit"],
    ),
    "labels that reach over a boundary": (
        "a message with their extent and number; purge sets them to null",
        TUNING,
        [
            "the_advice_is_the_reach_of_the_labels_and_what_was_counted",
            "purging_makes_null_what_reaches_over_and_nothing_else",
        ],
    ),
    "$ in names, braces in paths, a long TMPDIR, a foreign kernel": (
        "a run",
        RUNS,
        ["a_run_is_made_whatever_its_names_and_folders_are_called", "pictures_show_names_as_they_are"],
    ),
    "symbols that are numbers, dates, bytes": (
        "text, seen in new bars",
        INPUTS,
        ["symbols_of_any_type_are_text", "symbols_of_train_are_recognised_in_new_bars"],
    ),
    "labels as text, words, noise, foreign values": (
        "numbers, or an error with values and counts",
        INPUTS,
        [
            "labels_as_numeric_text_are_numbers",
            "labels_with_rounding_errors_are_rounded_with_a_warning",
            "labels_outside_the_classes_are_counted_in_a_warning",
            "labels_of_another_type_raise_an_error_with_the_column",
        ],
    ),
    "new bars with text, lists, times as features": (
        "refused with the name of the column",
        INPUTS,
        ["new_bars_of_another_type_raise_an_error_with_the_column"],
    ),
    "closes above the high by a rounding": (
        "bars are widened and counted",
        INPUTS,
        ["closes_outside_by_a_rounding_error_widen_the_bar_with_a_warning"],
    ),
    "a loss that becomes NaN": (
        "an error at once, with the setting to lower",
        TRAINING,
        [
            "a_fit_that_diverges_at_once_says_what_to_lower_before_anything_is_predicted",
            "the_best_round_is_never_one_whose_loss_is_nan",
        ],
    ),
    "NaN in features, on the command line": (
        "all columns at once, and options of the same names",
        RUNS,
        ["options_say_what_of_the_data_is_used"],
    ),
    "an orphaned trial, odd paths of studies, MLflow's deleted experiment": (
        "a study that ends, in the given file; one line with the fix",
        TUNING,
        [
            "a_trial_that_nobody_works_on_is_made_by_another",
            "a_study_is_kept_in_the_file_that_was_named",
            "an_experiment_that_was_deleted_is_one_line_with_what_to_do",
        ],
    ),
    "folders of parts, CSV, keys in the index": (
        "read, or an error with the function to call",
        INPUTS,
        ["folders_of_parts_are_read", "csv_files_are_read_like_parquet_files", "keys_may_be_levels_of_the_index"],
    ),
    "a class with almost no rows, a leak": (
        "reported by grid and comparison; check and grid give the same result",
        TRAINING,
        [
            "warnings_on_prices_and_classes_reach_check_run_grid_and_comparison",
            "check_and_grid_read_the_same_splits_and_end_alike",
        ],
    ),
    "a test that hangs": (
        "ended and reported; other tests continue",
        "test_waiting",
        ["a_hanging_test_is_ended_and_reported_and_the_others_run", "every_wait_has_a_limit"],
    ),
    "manifests that name files elsewhere, links, pipes": (
        "refused, nothing outside is written",
        HOSTILE,
        [
            "a_manifest_that_names_a_file_outside_the_run_is_refused",
            "a_link_in_a_run_is_refused_though_its_content_is_right",
            "a_pipe_in_a_run_does_not_block_its_reader",
        ],
    ),
    "plugins and settings of a received folder": (
        "not run, listed",
        HOSTILE,
        ["a_plugin_in_a_received_folder_of_runs_is_not_run", "where_plugins_run_and_where_not"],
    ),
    "weights that crash their reader, archives that unpack to a large size": (
        "an error in the caller",
        HOSTILE,
        [
            "a_flipped_byte_crashes_no_caller_and_changes_nothing_elsewhere",
            "a_small_archive_that_unpacks_to_much_is_not_unpacked",
        ],
    ),
    "one damaged manifest among others": (
        "skipped with one line; the comparison lists it",
        HOSTILE,
        ["one_damaged_manifest_is_skipped_with_one_line", "the_comparison_lists_what_it_left_out"],
    ),
    "270 rows of nine classes": (
        "leaf sizes that suit the data; a note if the fit learnt nothing",
        TRAINING,
        ["defaults_follow_rows_and_classes_and_a_fit_without_a_split_says_so"],
    ),
    "a grid with models that are not available, a plugin of the contract alone": (
        "the documented exit code; a plugin with all functions",
        TUNING,
        ["the_exit_code_of_a_grid_is_the_one_its_help_promises", "a_plugin_that_keeps_to_the_contract_alone_is_whole"],
    ),
    "presets and parameters from another folder": (
        "those of the package; an unknown name is an error",
        RUNS,
        [
            "from_a_folder_of_ones_own_presets_grids_and_notebooks_are_those_of_the_package",
            "an_unknown_preset_or_grid_is_an_error_that_lists_those_there_are",
        ],
    ),
    "files as upstream writes them": (
        "a comparison, made with the command line only",
        "test_upstream_files",
        ["from_upstream_files_to_a_comparison_by_the_command_line_alone"],
    ),
}


@pytest.mark.parametrize("report", REPORTS)
def test_every_report_has_its_tests(report):
    _, file, names = REPORTS[report]
    source = (Path(__file__).with_name(f"{file}.py")).read_text(encoding="utf8")
    defined = {node.name for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)}
    assert {f"test_{name}" for name in names} <= defined
