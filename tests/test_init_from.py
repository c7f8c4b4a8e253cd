"""--init_from: a run that begins with weights of another model."""

import json
import shutil

import pytest
import torch
from tiny_run import records
from transformers import GPT2Config, GPT2LMHeadModel

from modeling_gpt2repro import GPT2ReproForCausalLM

FEW = ("--max_steps", 4, "--eval_every", 4, "--save_every", 2, "--eval.hellaswag", "null", "--optim.lr", 1e-4)


def val_losses(run):
    return [record["val_loss"] for record in records(run, "val_loss")]


def test_a_gpt2_of_transformers(launch, tiny, tmp_path):
    """The weights bring their shape; their dropout is replaced by the settings'. Resuming does not need them."""
    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=48, n_head=3, n_positions=64))
    gpt2.save_pretrained(tmp_path / "gpt2")
    arguments = ("--config", tiny, *FEW, "--init_from", tmp_path / "gpt2", "--output_dir", tmp_path / "run")
    done = launch(*arguments)
    assert "1 layers, 48 wide, 3 heads" in done.stdout
    assert "except dropout" in done.stdout
    trained = GPT2ReproForCausalLM.from_pretrained(tmp_path / "run" / "checkpoints" / "step_000004")
    assert (trained.config.n_positions, trained.config.resid_pdrop) == (64, 0.0)
    # Four steps at a small rate leave it near where it began, and better.
    start = gpt2.transformer.wte.weight
    assert 0 < (trained.transformer.wte.weight - start).abs().max() < 2e-3
    assert val_losses(tmp_path / "run")[-1] < val_losses(tmp_path / "run")[0]
    provenance = json.loads((tmp_path / "run" / "provenance.json").read_text())
    assert provenance["config"]["model"]["n_embd"] == 48

    shutil.rmtree(tmp_path / "gpt2")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_000004")
    assert "step 2" in launch(*arguments, "--resume", "auto").stdout
    again = GPT2ReproForCausalLM.from_pretrained(tmp_path / "run" / "checkpoints" / "step_000004")
    assert torch.equal(again.transformer.wte.weight, trained.transformer.wte.weight)


def test_a_checkpoint(finished_small, launch, small, tmp_path):
    checkpoint = finished_small / "checkpoints" / "step_000020"
    launch("--config", small, *FEW, "--init_from", checkpoint, "--output_dir", tmp_path / "run")
    assert val_losses(tmp_path / "run")[0] == pytest.approx(val_losses(finished_small)[-1], abs=1e-6)
