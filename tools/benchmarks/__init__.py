"""What `tools/bench` measures: one subject a file, each with a command of its name."""
