"""`python -m data.prepare` with small tasks, and Ctrl-C as in a terminal; then the peak memory."""

if __name__ == "__main__":  # the imports too: worker processes import this file
    import os
    import signal
    import sys
    from pathlib import Path

    from common.cli import prepare_process
    from data import plan, prepare, sources

    prepare_process()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also if the tests run in the background
    sources.TASK_BYTES = plan.TASK_BYTES = int(os.environ.get("TASK_BYTES", "300_000"))
    sources._STREAM_BYTES = 1
    code = prepare.main(sys.argv[1:])
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text().splitlines()
        print(next(line for line in status if line.startswith("VmHWM")).split()[1])  # KiB
    sys.exit(code)
