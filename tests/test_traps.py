"""
Traps of transformers, accelerate, data and systems that this project can step into, each with the test that holds it.

Numbers in parentheses are issues of the library's repository. A trap without a test here cannot be met in this project,
for example because it has no scheduler object, no `accelerator.save_state` and no vocabulary of its own.
"""

import ast

import pytest
from tiny_run import ROOT

TRAPS = {
    # transformers 5
    "_init_weights is called only for modules that own parameters, so projections keep the wrong std": (
        "modeling/test_modeling.py::test_initial_std_of_all_weights"
    ),
    "in-place .data.normal_() in _init_weights leaves random weights after from_pretrained (46620)": (
        "modeling/test_ecosystem.py::test_every_way_of_loading_keeps_the_tie_and_the_logits"
    ),
    "_tied_weights_keys is a dict; resizing and saving keep the tie": (
        "modeling/test_ecosystem.py::test_resized_vocabulary_keeps_the_tie"
    ),
    "dtype defaults to what was saved: a bf16 checkpoint opens as bf16": (
        "modeling/test_ecosystem.py::test_bf16_checkpoint_loads_as_bf16"
    ),
    "attention goes through ALL_ATTENTION_FUNCTIONS, with all keyword arguments": (
        "modeling/test_attention.py::test_registered_attention_function_gets_all_keyword_arguments"
    ),
    "position ids follow a left-padded attention mask": (
        "modeling/test_modeling.py::test_padding_does_not_change_real_tokens"
    ),
    "a forward that ignores num_items_in_batch multiplies Trainer's loss (47688)": (
        "modeling/test_ecosystem.py::test_trainer_trains_and_resumes"
    ),
    "custom code files are missing after a push (29714)": (
        "hub/test_push.py::test_pushed_model_opens_without_this_project"
    ),
    "vLLM reads auto_map, the attention interface and the source": (
        "hub/test_vllm.py::test_vllm_steps_give_the_logits_of_the_model"
    ),
    "llama.cpp knows gpt2 alone": "hub/test_export.py::test_llama_cpp_writes_the_same_text_up_to_rounding",
    "a local folder of custom code is imported twice, and a head gets the config of the other copy": (
        "modeling/test_checkpoint_cases.py::test_checkpoint_works_without_the_project"
    ),
    "Trainer shifts labels for label smoothing only for names that it knows": (
        "modeling/test_trainer.py::test_label_smoothing_shifts_the_labels"
    ),
    "context and sequence parallelism pass labels and shift_labels together": (
        "modeling/test_modeling.py::test_loss_shifts_the_labels"
    ),
    "AutoTokenizer loads AutoConfig first and asks about custom code": (
        "test_docs.py::test_only_trust_remote_code_keeps_the_auto_classes_from_asking"
    ),
    "transformers serve looks the class up in transformers": (
        "hub/test_export.py::test_transformers_serve_answers_on_an_export"
    ),
    # accelerate
    "processes started on a CPU do not find each other": (
        "training/test_distributed.py::test_processes_that_do_not_see_each_other_are_refused"
    ),
    "an FSDP configuration on a CPU silently becomes DDP": (
        "training/test_distributed.py::test_fsdp_on_a_cpu_is_refused"
    ),
    "a prepared scheduler steps once per process (1382)": "test_numerics.py::test_two_processes",
    "backward divides by accelerate's own accumulation": "test_train.py::test_losses_follow_a_plain_pytorch_loop",
    "DDP exchanges gradients in the last micro-batch only (build-nanogpt 30)": (
        "test_train.py::test_two_processes_give_the_losses_of_one_and_part"
    ),
    "outputs of a prepared model are converted to float32, the logits too": (
        "modeling/test_trainer.py::test_training_step_never_holds_the_full_logits"
    ),
    "resuming replays the shuffle of epoch 0 (4195)": "test_mixture_run.py::test_stopped_run_resumes_bit_for_bit",
    "custom checkpoint objects are unpickled": "test_train.py::test_checkpoint_has_no_pickle_and_no_stray_file",
    "FSDP2 and tied embeddings (4171)": "training/test_sharding.py::test_fsdp2_trains_and_saves_like_full_tensors",
    "prefixes of compile and DDP in saved keys": "test_numerics.py::test_one_process",
    # Data and evaluation
    "windows read in the order of the files make the loss periodic (build-nanogpt 52)": (
        "data/test_loader.py::test_permutations_look_random"
    ),
    "no __main__ guard breaks spawned processes on Windows and macOS (build-nanogpt 4)": (
        "test_traps.py::test_every_script_has_a_main_guard"
    ),
    "tokenizers download their files at first use": (
        "data/test_tokenizer.py::test_both_vocabulary_files_are_the_published_ones"
    ),
    "evaluate.load of a name needs a network; of a local folder it does not": (
        "eval/test_evaluate_metric.py::test_evaluate_load_works_offline_with_the_path_in_the_readme"
    ),
    "lm-eval's HellaSwag has another prompt and another norm than the lecture's": (
        "eval/test_against_lm_eval.py::test_hellaswag_log_likelihoods_match_lm_eval"
    ),
    "torch.load of an untrusted file runs code": (
        "test_mistakes.py::test_a_mistake_ends_with_one_line_and_exit_code_2"  # pytorch_model.bin, in every command
    ),
    # Systems
    "Windows: fsync, directory links, SIGUSR1, cp125x; NFS: locks; weights that are readable by others": (
        "test_machines.py::test_everything_lives_through_all_at_once"
    ),
    "copies, archives and cloud drives turn links into folders": (
        "training/test_checkpoint.py::test_stale_best_link_is_removed_and_stale_copy_is_left_alone"
    ),
}


@pytest.mark.parametrize("trap", TRAPS)
def test_trap_has_its_test(trap):
    path, _, name = TRAPS[trap].partition("::")
    tree = ast.parse((ROOT / "tests" / path).read_text(encoding="utf-8"))
    names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert name in names


def test_every_script_has_a_main_guard():
    """A spawned process imports the main module again; without a guard it would run it again."""
    scripts = [ROOT / "train.py", ROOT / "sample.py", ROOT / "data" / "prepare.py", ROOT / "data" / "verify.py"]
    scripts += [*(ROOT / "benchmarks").glob("[!_]*.py"), *ROOT.glob("*/__main__.py"), ROOT / "eval" / "miniseries.py"]
    for path in scripts:
        calls = [
            node
            for node in ast.parse(path.read_text(encoding="utf-8")).body
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
        ]
        for call in calls:  # only what is harmless to repeat
            assert ast.unparse(call).startswith(("gc.", "AutoConfig.", "AutoModel")), f"{path}: {ast.unparse(call)}"
