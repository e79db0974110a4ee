"""The command line: `app` (the commands), `run` (run, status), `adapters` (adapter, chat, score)."""
