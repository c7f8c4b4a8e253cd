"""Publish, export and try checkpoints.

python -m hub push CHECKPOINT USER/NAME               push to the Hub with a model card, in one commit
python -m hub export CHECKPOINT --to gpt2|onnx|gguf --out DIR
python -m hub demo CHECKPOINT [CHECKPOINT]            try a checkpoint in the browser, or compare two
"""

import argparse
import logging
import sys
from collections.abc import Callable, Sequence

from common.checkpoints import resolve_checkpoint
from common.cli import Parser, prepare_process, run_command

if __name__ == "__main__":
    prepare_process()


def _parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m hub",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="push|export|demo")

    def add_command(name: str, run: Callable[[argparse.Namespace], None], help: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=help, allow_abbrev=False)
        command.set_defaults(run=run)
        return command

    push = add_command("push", _push, "push a checkpoint to the Hub")
    push.add_argument("checkpoint", help="folder of a checkpoint (runs/x/checkpoints/...) or of a plain GPT-2")
    push.add_argument("repository", metavar="USER/NAME", help="created if it does not exist")
    push.add_argument("--public", action="store_true", help="make it public (default: private)")
    push.add_argument(
        "--results", nargs="+", default=[], metavar="FILE", help="scores for the card, from `python -m eval --output`"
    )
    push.add_argument("--dry_run", action="store_true", help="print the model card and the files, without the network")

    export = add_command("export", _export, "write a checkpoint for other engines")
    export.add_argument("checkpoint", help="folder of a checkpoint or of a plain GPT-2, or its id on the Hub")
    export.add_argument("--to", required=True, choices=["gpt2", "onnx", "gguf"], help="format")
    export.add_argument("--out", required=True, metavar="DIR", help="new folder")

    demo = add_command("demo", _demo, "try a checkpoint in the browser")
    demo.add_argument("checkpoint", nargs="+", help="one, or two to compare: folders, or ids on the Hub")
    demo.add_argument("--port", type=int, default=7860, help="port on this machine (default: 7860)")
    demo.add_argument("--device", help="cuda, mps or cpu (default: the first that is available)")
    demo.add_argument("--trust_remote_code", action="store_true", help="run the modeling code of a model from the Hub")
    return parser.parse_args(arguments)


def _push(args: argparse.Namespace) -> None:
    from hub.push import Repository, check_repo_id, collect_files

    check_repo_id(args.repository)
    plan = collect_files(resolve_checkpoint(args.checkpoint), args.repository, results=args.results)
    if args.dry_run:
        card = plan.files["README.md"]
        print((card if isinstance(card, bytes) else card.read_bytes()).decode())
        for path, source in plan.files.items():
            print(f"{len(source) if isinstance(source, bytes) else source.stat().st_size:>14,} bytes  {path}")
        return
    repository = Repository(args.repository, private=not args.public)
    url, removed = repository.push(plan)
    visibility = "private" if repository.is_private else "public"
    print(f"pushed {args.checkpoint} to {repository.repo_id} ({visibility})\n{url}")
    if removed:
        print(f"removed weights of an earlier push: {', '.join(removed)}")


def _export(args: argparse.Namespace) -> None:
    from hub.export import export

    for path in export(args.checkpoint, to=args.to, out=args.out):
        print(f"{path.stat().st_size:>14,} bytes  {path}")


def _demo(args: argparse.Namespace) -> None:
    from hub.demo import serve

    serve(args.checkpoint, port=args.port, device=args.device, trust_remote_code=args.trust_remote_code)


def _run(arguments: Sequence[str] | None) -> None:
    args = _parse_arguments(arguments)
    args.run(args)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code; see `common.cli.run_command`."""
    return run_command(_run, arguments, on_interrupt="stopped")


if __name__ == "__main__":
    logging.disable(logging.WARNING)  # the libraries' warnings; the checks of the commands report what matters
    sys.exit(main())
