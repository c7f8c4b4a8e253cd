"""The bottom layer: what every other folder may use. Of this project it imports the model only.

errors.py       UserError, the one base class of errors that the user can fix
cli.py          what the commands share: argument parser, output streams, errors on one line, Ctrl-C
terminal.py     Ctrl-C under `accelerate launch`, the progress bar, the terminal's title
launch.py       the processes of a launch: one does something, once, and the others wait
models.py       open a checkpoint, or a GPT-2 in particular, with its tokenizer; the device for it
weights.py      incomplete, missing or unsafe weights, found without loading them; their hash
hub.py          the Hugging Face Hub: find out whether it can be reached; repeat requests that fail
jsonl.py        files of JSON lines, plain or compressed
files.py        atomic writes, JSON, flushing to the disk, permissions
locks.py        one process at a time, also on disks without locks
checkpoints.py  a run's checkpoints by name: `best`, and what a run's folder holds; damage in them
metrics.py      a run's metrics.jsonl
markdown.py     tables
"""
