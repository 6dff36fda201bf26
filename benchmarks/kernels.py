"""Each fused operation, GB/s and share of a device copy: `sdd bench kernels`, its result kept in benchmarks/results."""

from _record import run_command

if __name__ == "__main__":
    run_command("kernels")
