"""FSDP2 with compiled blocks, on two processes without GPUs: accelerate's wrapping, done by hand."""

from tiny_run import ROOT


def test_fsdp2_trains_and_saves_like_full_tensors(launch):
    program = ROOT / "tests" / "training" / "sharded_training.py"
    arguments = ("torch.distributed.run", "--standalone", "--nproc_per_node=2", program)
    done = launch(*arguments, script="-m", environment={"PYTHONPATH": str(ROOT)})
    assert done.stdout.splitlines() == ["AdamW: equal", "Muon: equal", "bfloat16: close"]
