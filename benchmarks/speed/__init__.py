"""What a step costs on the clock: `python -m wantrim.benchmarks.speed`."""
