"""The program `rlhf-trl`: also `python -m rlhf_trl` and `accelerate launch -m rlhf_trl`."""

from rlhf_trl.run import signals


def main() -> None:
    """Run the command line; a signal decides the exit status from the first import on."""
    signals.install()
    try:
        from rlhf_trl.cli.app import main as run_command_line

        run_command_line()
    finally:
        if signals.received:
            raise SystemExit(128 + signals.received[0])


if __name__ == "__main__":
    main()
