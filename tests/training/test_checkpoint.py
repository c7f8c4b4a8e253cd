"""Checkpoints in one process: killed at each of its changes to the disk, thinned out, damaged."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType

from common.checkpoints import find_damage, resolve_checkpoint
from data.tokenizer import GPT2
from modeling_gpt2repro import GPT2ReproConfig, GPT2ReproForCausalLM
from training import TrainingError, checkpoint
from training.checkpoint import (
    CheckpointWriter,
    LoopState,
    checkpoint_folder,
    find_checkpoint,
    load_state,
    remove_leftovers,
)
from training.config import OptimConfig
from training.optim import build_optimizer


@pytest.fixture(scope="module")
def trained():
    """A model and its optimizer after a step, as `TrainingModels`."""
    model = GPT2ReproForCausalLM(GPT2ReproConfig(n_layer=1, n_embd=8, n_head=2, n_positions=8))
    optimizer = build_optimizer(model, OptimConfig(lr=1e-3))
    tokens = torch.arange(8)[None]
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    return SimpleNamespace(bare=model, optimizer=optimizer)


@pytest.fixture(scope="module")
def tokenizer():
    return GPT2.hf(model_max_length=8)


@pytest.fixture
def make_writer(trained, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "gather_object", lambda of_this_process: of_this_process)
    accelerator = SimpleNamespace(
        is_main_process=True, device=torch.device("cpu"), distributed_type=DistributedType.NO, scaler=None
    )

    def make_writer(in_background=None, **keep):
        fingerprint = {"tokens_per_step": 8}
        return CheckpointWriter(
            tmp_path, accelerator, trained, tokenizer, fingerprint, **keep, in_background=in_background
        )

    return make_writer


@pytest.fixture
def save(tmp_path):
    def save(writer, step, val_loss=None):
        writer.save(LoopState(step=step, val_loss=val_loss, evaluated=val_loss is not None))
        writer.finish()
        return checkpoint_folder(tmp_path, step)

    return save


def best(folder):
    return Path(resolve_checkpoint(folder / "checkpoints" / "best")).name


def names(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


class Killed(BaseException):
    """Skips all clean-up."""


class Disk:
    """Fails before one of the changes made to it."""

    def __init__(self, dies_at):
        self.dies_at, self.num_changes = dies_at, 0

    def count(self, change):
        def counted(*args, **kwargs):
            self.num_changes += 1
            if self.num_changes == self.dies_at:
                raise Killed
            return change(*args, **kwargs)

        return counted


def test_kill_between_any_two_changes_of_the_disk_leaves_a_checkpoint(make_writer, save, tmp_path, monkeypatch):
    """Step 1 is saved; then step 1 again, or step 2, which removes step 1."""
    save(make_writer(), 1)
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
                    patch.setattr(owner, name, disk.count(getattr(owner, name)))
                try:
                    save(make_writer(keep_last=1), step)
                    finished = True
                except Killed:
                    finished = False
            remove_leftovers(tmp_path)
            assert not [name for name in names(tmp_path) if name.startswith(".step")]
            found = find_checkpoint("auto", tmp_path)
            assert found is not None and found.name in ("step_000001", f"step_{step:06d}")
            if finished:
                assert found.name == f"step_{step:06d}"
                break
        assert 15 < disk.num_changes < 200  # each of them was tried


def test_kept_checkpoints(make_writer, save, tmp_path):
    losses = {1: 5.0, 2: 3.0, 3: None, 4: 4.0, 5: 4.5, 6: 4.2}
    writer = make_writer(keep_last=2, keep_every=3)
    for step, val_loss in losses.items():
        save(writer, step, val_loss)
    assert names(tmp_path) == ["step_000002", "step_000003", "step_000005", "step_000006"]
    assert best(tmp_path) == "step_000002"
    keep_all = make_writer()
    for step in (7, 8, 9):
        save(keep_all, step)
    assert len(names(tmp_path)) == 7
    save(make_writer(keep_last=1, keep_best=False), 10, 9.0)
    assert names(tmp_path) == ["step_000010"]
    assert best(tmp_path) == "step_000010"  # of those that are left
    # A diverged run is not the best, and steps after an earlier one are left alone.
    diverged = save(keep_all, 11, float("nan"))
    assert json.loads((diverged / "training_state" / "state.json").read_text())["val_loss"] is None
    assert best(tmp_path) != "step_000011"
    save(make_writer(keep_last=1), 4)
    assert {"step_000004", "step_000010"} <= set(names(tmp_path))


def test_background_save_has_the_state_of_its_step(make_writer, trained, tmp_path):
    model = trained.bare
    writer = make_writer(in_background=True)
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    writer.save(LoopState(step=3))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    writer.finish()
    reloaded = GPT2ReproForCausalLM.from_pretrained(checkpoint_folder(tmp_path, 3))
    for name, p in reloaded.named_parameters():
        assert torch.equal(p, expected[name]), name


def test_stale_best_link_is_removed_and_stale_copy_is_left_alone(make_writer, save, tmp_path):
    """Both are left from an earlier version's run; neither decides which checkpoint is the best."""
    older = save(make_writer(), 1, 5.0)
    path = tmp_path / "checkpoints" / "best"
    path.symlink_to("step_000001", target_is_directory=True)
    save(make_writer(), 2, 4.0)
    assert not path.is_symlink()
    shutil.copytree(older, path)
    assert best(tmp_path) == "step_000002"
    save(make_writer(keep_last=1), 3)
    assert names(tmp_path) == ["best", "step_000002", "step_000003"]


def test_failure_to_remove_old_checkpoints_is_a_warning(make_writer, save, monkeypatch, capsys):
    def refuse(self, step):
        raise PermissionError("not yours")

    monkeypatch.setattr(CheckpointWriter, "_remove_old", refuse)
    assert find_damage(save(make_writer(), 1)) is None
    assert "not yours" in capsys.readouterr().out


def test_full_disk_leaves_earlier_checkpoints_complete(make_writer, save, tokenizer, tmp_path, monkeypatch):
    """Found before writing, or by the tokenizers package, which has no class for it."""
    save(make_writer(), 1)
    with monkeypatch.context() as patch:
        usage = shutil.disk_usage(tmp_path)
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
        with pytest.raises(TrainingError, match=r"the disk has 0\.00 GB left\. It needs 0\.02 GB: make room"):
            save(make_writer(), 2)

    def save_pretrained(folder):
        raise Exception("No space left on device (os error 28)")

    monkeypatch.setattr(tokenizer, "save_pretrained", save_pretrained)
    with pytest.raises(TrainingError, match="No space left"):
        save(make_writer(), 2)
    assert names(tmp_path) == ["step_000001"]
    assert find_damage(tmp_path / "checkpoints" / "step_000001") is None


def test_resuming_in_the_runs_folder_is_from_its_newest_checkpoint(make_writer, save, tmp_path):
    """From an earlier one, --resume auto would later jump back to the branch that was left."""
    writer = make_writer()
    older, newest = save(writer, 1), save(writer, 2)
    assert find_checkpoint(str(newest), tmp_path) == newest
    assert find_checkpoint(str(older), tmp_path / "branch") == older
    with pytest.raises(TrainingError, match=r"also holds step_000002.* another --output_dir"):
        find_checkpoint(str(older), tmp_path)


def test_damage_in_every_file_is_found(make_writer, save):
    folder = save(make_writer(), 1)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        content = path.read_bytes()
        for damaged in (content[:-1], content[:-1] + bytes([content[-1] ^ 1]), b""):
            path.write_bytes(damaged)
            if path.name != "manifest.json" or damaged != content[:-1]:  # its last byte is a line break
                assert find_damage(folder) is not None, path
        path.unlink()
        assert find_damage(folder) is not None, path
        path.write_bytes(content)
    assert find_damage(folder) is None


def test_damaged_checkpoints_are_skipped_or_refused(make_writer, save, tmp_path, capsys):
    folder = save(make_writer(), 1)
    (folder / "model.safetensors").unlink()
    with pytest.raises(TrainingError, match=r"every checkpoint in .* is damaged"):
        find_checkpoint("auto", tmp_path)
    assert "model.safetensors is missing" in capsys.readouterr().out
    with pytest.raises(TrainingError, match=r"model\.safetensors is missing; resume from another"):
        find_checkpoint(str(folder), tmp_path)
    assert find_checkpoint("auto", tmp_path / "nowhere") is None


def test_state_of_an_earlier_version_is_read(make_writer, save, tmp_path):
    """With the keys as they have always been written."""
    folder = save(make_writer(), 1)
    path = folder / "training_state" / "state.json"
    state = {"step": 1, "tokens": 8, "val_loss": None, "evaluated": False, "num_skipped": 2, "skipped_in_a_row": 1}
    path.write_text(json.dumps(state | {"seed": 3}))
    state = load_state(folder, {"seed": 3}, tmp_path)
    assert state == LoopState(step=1, num_skipped=2, consecutive_skips=1, saved=True)
    assert not load_state(folder, {"seed": 3}, tmp_path / "another").saved
    assert not load_state(folder.rename(tmp_path / "checkpoints" / "final"), {"seed": 3}, tmp_path).saved
    with pytest.raises(TrainingError, match=r"seed=3.* 4"):
        load_state(tmp_path / "checkpoints" / "final", {"seed": 4}, tmp_path)
