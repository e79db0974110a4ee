"""`python -m rlhf_trl` and `accelerate launch -m rlhf_trl`."""

from rlhf_trl.cli.app import main

if __name__ == "__main__":
    main()
