"""
python -m hub push CHECKPOINT USER/NAME               one commit on the Hub, model card included; private by default
python -m hub export CHECKPOINT --to gpt2|onnx|gguf --out DIR
python -m hub demo CHECKPOINT [CHECKPOINT]            a page on this machine to try one, or two side by side
"""

import argparse
import logging
import sys

from common.checkpoints import resolve_checkpoint
from common.cli import Parser, prepare_process, run_command

if __name__ == "__main__":
    prepare_process()


def _parse_arguments(arguments):
    parser = Parser(
        prog="python -m hub",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="push|export|demo")

    push = commands.add_parser("push", help="share a checkpoint on the Hub", allow_abbrev=False)
    push.add_argument("checkpoint", help="folder of train.py's (runs/x/checkpoints/...) or of a plain GPT-2")
    push.add_argument("repository", metavar="USER/NAME", help="made if it is not there")
    push.add_argument("--public", action="store_true", help="for everybody to see; else for its owner alone")
    push.add_argument(
        "--results", nargs="+", default=[], metavar="FILE", help="of `python -m eval --output`, for the model card"
    )
    push.add_argument(
        "--dry_run", action="store_true", help="print the model card and what would be uploaded, and ask nobody"
    )

    export = commands.add_parser("export", help="write a checkpoint for other engines", allow_abbrev=False)
    export.add_argument("checkpoint", help="folder of a checkpoint or of a plain GPT-2, or its id on the Hub")
    export.add_argument("--to", required=True, choices=["gpt2", "onnx", "gguf"], help="the format")
    export.add_argument("--out", required=True, metavar="DIR", help="a new folder")

    demo = commands.add_parser("demo", help="a page to try a checkpoint", allow_abbrev=False)
    demo.add_argument("checkpoint", nargs="+", help="one, or two to compare: folders, or ids on the Hub")
    demo.add_argument("--port", type=int, default=7860, help="of the page, on this machine alone (default: 7860)")
    demo.add_argument("--device", help="cuda, mps or cpu; by default the first of them that is there")
    demo.add_argument("--trust_remote_code", action="store_true", help="run the modeling code of a model from the Hub")
    return parser.parse_args(arguments)


def _push(args):
    from hub.push import Repository, check_repo_id, prepare_upload

    check_repo_id(args.repository)
    args.checkpoint = resolve_checkpoint(args.checkpoint)
    upload = prepare_upload(args.checkpoint, args.repository, results=args.results)
    if args.dry_run:
        card = upload.files["README.md"]
        print((card if isinstance(card, bytes) else card.read_bytes()).decode())
        for path, source in upload.files.items():
            print(f"{len(source) if isinstance(source, bytes) else source.stat().st_size:>14,} bytes  {path}")
        return
    repository = Repository(args.repository, private=not args.public)
    address, removed = repository.push(upload)
    seen = "private" if repository.is_private else "public"
    print(f"pushed {args.checkpoint} to {repository.name} ({seen})\n{address}")
    if removed:
        print(f"removed weights of an earlier push: {', '.join(removed)}")


def _export(args):
    from hub.export import export

    for path in export(args.checkpoint, to=args.to, out=args.out):
        print(f"{path.stat().st_size:>14,} bytes  {path}")


def _demo(args):
    from hub.demo import serve

    serve(args.checkpoint, port=args.port, device=args.device, trust_remote_code=args.trust_remote_code)


def main(arguments=None):
    """Run a command and return its exit code; see `common.cli.run_command`."""

    def run(arguments):
        args = _parse_arguments(arguments)
        {"push": _push, "export": _export, "demo": _demo}[args.command](args)

    return run_command(run, arguments, on_interrupt="stopped")


if __name__ == "__main__":
    logging.disable(logging.WARNING)  # the libraries' chatter; what matters of it is checked and said here
    sys.exit(main())
