"""`python -m data.prepare` with one part per file, small batches, and Ctrl-C as in a terminal; then the peak memory."""

if __name__ == "__main__":  # the imports too: worker processes import this file
    import signal
    import sys
    from pathlib import Path

    from common.cli import prepare_process
    from data import encode, plan, prepare

    prepare_process()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also if the tests run in the background
    plan.PART_BYTES, encode._BATCH_BYTES = 1, 20_000
    code = prepare.main(sys.argv[1:])
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text().splitlines()
        print(next(line for line in status if line.startswith("VmHWM")).split()[1])  # KiB
    sys.exit(code)
