"""Checkpoints in one process: killed at each of its steps, thinned out, damaged."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType

from common.checkpoints import find_damage, resolve_checkpoint
from data.tokenizer import load_hf_tokenizer
from modeling_gpt2repro import GPT2ReproConfig, GPT2ReproForCausalLM
from training import TrainingError, checkpoint
from training.checkpoint import (
    CheckpointWriter,
    SaveError,
    clear_left_overs,
    find_checkpoint,
)
from training.config import OptimConfig
from training.optim import build_optimizer


@pytest.fixture(scope="module")
def trained():
    """(model, optimizer) after a step."""
    model = GPT2ReproForCausalLM(GPT2ReproConfig(n_layer=1, n_embd=8, n_head=2, n_positions=8))
    optimizer = build_optimizer(model, OptimConfig(lr=1e-3), "cpu")
    tokens = torch.arange(8)[None]
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    return model, optimizer


@pytest.fixture
def writer(trained, tmp_path):
    def make(**options):
        accelerator = SimpleNamespace(
            is_main_process=True, device=torch.device("cpu"), distributed_type=DistributedType.NO
        )
        return CheckpointWriter(
            tmp_path,
            accelerator=accelerator,
            model=trained[0],
            tokenizer=load_hf_tokenizer(model_max_length=8),
            **options,
        )

    return make


@pytest.fixture
def save(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "gather_object", lambda of_this_process: of_this_process)

    def save(writer, step, val_loss=None):
        writer.save(*trained, {"step": step, "val_loss": val_loss})
        return writer.finished(wait=True)

    return save


def best(folder):
    return Path(resolve_checkpoint(folder / "checkpoints" / "best")).name


def names(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


class Killed(BaseException):
    """Nothing tidies up after it."""


class Disk:
    """Dies before one of the changes made to it."""

    def __init__(self, dies_at):
        self.dies_at, self.made = dies_at, 0

    def counted(self, change):
        def counted(*arguments, **more):
            self.made += 1
            if self.made == self.dies_at:
                raise Killed
            return change(*arguments, **more)

        return counted


def test_killed_between_any_two_changes_of_the_disk(writer, save, tmp_path, monkeypatch):
    """Step 1 is saved, then step 1 again, then 2 with step 1 removed: whole checkpoints at every moment."""
    save(writer(), 1)
    shutil.copytree(tmp_path / "checkpoints", tmp_path / "before", symlinks=True)
    changes = [(Path, "rename"), (Path, "replace"), (Path, "mkdir"), (Path, "symlink_to"), (shutil, "rmtree")]
    changes += [(checkpoint, "save_file"), (checkpoint, "flush_to_disk"), (os, "fsync")]
    for step in (1, 2):
        for dies_at in range(1, 200):
            shutil.rmtree(tmp_path / "checkpoints")
            shutil.copytree(tmp_path / "before", tmp_path / "checkpoints", symlinks=True)
            disk = Disk(dies_at)
            with monkeypatch.context() as patch:
                for owner, name in changes:
                    patch.setattr(owner, name, disk.counted(getattr(owner, name)))
                try:
                    save(writer(keep_last=1), step)
                    finished = True
                except Killed:
                    finished = False
            clear_left_overs(tmp_path)
            assert not [name for name in names(tmp_path) if name.startswith(".step")]
            found = find_checkpoint("auto", tmp_path, pytest.fail)
            assert found is not None and found.name in ("step_000001", f"step_{step:06d}")
            if finished:
                assert found.name == f"step_{step:06d}"
                break
        assert 15 < disk.made < 200  # each of them was tried


def test_which_ones_stay(writer, save, tmp_path):
    losses = {1: 5.0, 2: 3.0, 3: None, 4: 4.0, 5: 4.5, 6: 4.2}
    keeping = writer(keep_last=2, keep_every=3)
    for step, val_loss in losses.items():
        save(keeping, step, val_loss)
    assert names(tmp_path) == ["step_000002", "step_000003", "step_000005", "step_000006"]
    assert best(tmp_path) == "step_000002"
    everything = writer()
    for step in (7, 8, 9):
        save(everything, step)
    assert len(names(tmp_path)) == 7
    save(writer(keep_last=1, keep_best=False), 10, 9.0)
    assert names(tmp_path) == ["step_000010"]
    assert best(tmp_path) == "step_000010"  # of those that are left
    # A run that has diverged is not the best, and what lies ahead of an earlier step is not touched.
    diverged = save(everything, 11, float("nan"))
    assert json.loads((diverged / "training_state" / "state.json").read_text())["val_loss"] is None
    assert best(tmp_path) != "step_000011"
    save(writer(keep_last=1), 4)
    assert {"step_000004", "step_000010"} <= set(names(tmp_path))


def test_written_in_the_background_while_training_goes_on(writer, trained, save, tmp_path):
    """What is saved is what was there when it was asked for."""
    model, optimizer = trained
    background = writer(in_background=True)
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    background.save(model, optimizer, {"step": 3, "val_loss": None})
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    folder = background.finished(wait=True)
    assert background.finished() is None
    reloaded = GPT2ReproForCausalLM.from_pretrained(folder)
    for name, p in reloaded.named_parameters():
        assert torch.equal(p, expected[name]), name


def test_stale_best_link_is_removed_and_stale_copy_is_left_alone(writer, save, tmp_path):
    """Both are left from an earlier version's run; neither decides which checkpoint is the best."""
    older = save(writer(), 1, 5.0)
    path, lines = tmp_path / "checkpoints" / "best", []
    path.symlink_to("step_000001", target_is_directory=True)
    save(writer(warn=lines.append), 2, 4.0)
    assert not path.is_symlink() and lines == []
    shutil.copytree(older, path)
    assert best(tmp_path) == "step_000002"
    copied = writer(warn=lines.append, keep_last=1)
    for step in (3, 4):
        save(copied, step)
    assert len(lines) == 1 and str(path) in lines[0]
    assert names(tmp_path) == ["best", "step_000002", "step_000004"]


def test_a_checkpoint_that_is_whole_is_not_called_failed(writer, save, tmp_path, monkeypatch):
    """Old ones that cannot be removed are another matter."""

    def refuse(self, step):
        raise PermissionError("not yours")

    lines = []
    monkeypatch.setattr(CheckpointWriter, "_remove_old", refuse)
    assert save(writer(warn=lines.append), 1).name == "step_000001"
    assert "is whole, but older checkpoints could not be put in order (not yours)" in lines[0]


def test_a_full_disk_is_one_whatever_raises(writer, save, monkeypatch):
    """The tokenizers package has no class for it."""
    full = writer()

    def save_pretrained(folder):
        raise Exception("No space left on device (os error 28)")

    monkeypatch.setattr(full.tokenizer, "save_pretrained", save_pretrained)
    with pytest.raises(SaveError, match="No space left"):
        save(full, 1)


def test_a_run_goes_on_from_its_newest_or_in_a_folder_of_its_own(writer, save, tmp_path):
    """From an earlier one, --resume auto would later jump back to the branch that was left."""
    older, newest = save(writer(), 1), save(writer(), 2)
    assert find_checkpoint(str(newest), tmp_path, pytest.fail) == newest
    assert find_checkpoint(str(older), tmp_path / "branch", pytest.fail) == older
    with pytest.raises(TrainingError, match=r"also holds step_000002.* another --output_dir"):
        find_checkpoint(str(older), tmp_path, pytest.fail)


def test_a_full_disk(writer, save, tmp_path, monkeypatch):
    save(writer(), 1)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(SaveError, match=r"the disk has 0\.00 GB left\. It needs 0\.02 GB: make room"):
        save(writer(), 2)
    assert names(tmp_path) == ["step_000001"]
    assert find_damage(tmp_path / "checkpoints" / "step_000001") is None


def test_every_file_is_looked_at(writer, save, tmp_path):
    folder = save(writer(), 1)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        whole = path.read_bytes()
        for damaged in (whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1]), b""):
            path.write_bytes(damaged)
            if path.name != "manifest.json" or damaged != whole[:-1]:  # its last byte is a line break
                assert find_damage(folder) is not None, path
        path.unlink()
        assert find_damage(folder) is not None, path
        path.write_bytes(whole)
    assert find_damage(folder) is None


def test_nothing_whole_is_left(writer, save, tmp_path):
    lines = []
    folder = save(writer(), 1)
    (folder / "model.safetensors").unlink()
    with pytest.raises(TrainingError, match=r"every checkpoint in .* is damaged"):
        find_checkpoint("auto", tmp_path, lines.append)
    assert "model.safetensors is missing" in lines[0]
    with pytest.raises(TrainingError, match=r"model\.safetensors is missing; resume from another"):
        find_checkpoint(str(folder), tmp_path, lines.append)
    assert find_checkpoint("auto", tmp_path / "nowhere", lines.append) is None
    assert json.loads((folder / "training_state" / "state.json").read_text())["step"] == 1
