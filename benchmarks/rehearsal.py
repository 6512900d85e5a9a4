"""How long all distinct ranks of the 88B job at 1,024 take to rehearse on this machine, and in how much memory."""

import resource
import time

from verdict import finish

from megatron_mm.engine import device

device.keep_out_accelerators()  # before megatron-core is imported

from megatron_mm import config as configs  # noqa: E402
from megatron_mm.planning.rehearsal import distinct_ranks, rehearse  # noqa: E402

SECONDS, GIB = 600.0, 8.0


def main() -> None:
    """Rehearse them one after the other."""
    config, world_size = configs.load("mm_88b"), 1024
    started = time.perf_counter()
    for rank in distinct_ranks(config, world_size):
        report = rehearse(config, rank=rank, world_size=world_size)
        held = {name: round(size / 2**30, 2) for name, size in {**report.peak, **report.additions}.items() if size}
        print(
            f"rank {rank:5} ({report.place}) {report.peak_bytes / 2**30:6.2f} GiB {held} {report.seconds:.0f} s",
            flush=True,
        )
    seconds = time.perf_counter() - started
    gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{seconds:.0f} s, {gib:.2f} GiB resident at most")
    finish("rehearsal", ours=seconds, peer=SECONDS, bar=1.0, holds=gib < GIB)


if __name__ == "__main__":
    main()
