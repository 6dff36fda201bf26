"""A training step of each placement: `sdd bench step-time`, its result kept in benchmarks/results."""

from _record import run_command

if __name__ == "__main__":
    run_command("step-time")
