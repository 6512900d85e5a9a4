"""What packing wastes and what it costs, at 8,192 tokens a sample, beside concatenation and a plain first-fit.

    python benchmarks/packing.py

Document lengths are lognormal. Padding and time are those of the plan that training uses (windows of documents, each
packed by best fit); the peer is first-fit over 64 open samples, as streaming loaders do it. Bar: padding under 1% for
each mean length, and not one document that fits into a sample cut.
"""

import time

import numpy as np
from verdict import finish

from megatron_mm.data import packing

SEQ_LEN = 8192
TOKENS = 1_000_000_000
MEANS = (300, 1_000, 2_500)
SIGMA = 1.3
OPEN_SAMPLES = 64
PEER_DOCUMENTS = 100_000
BAR = 0.01


def main() -> None:
    """Pack each distribution and say whether the bar holds."""
    print("fitting documents that are cut: by ours, and by concatenation")
    print(
        f"{'mean':>6}{'documents':>11}{'ns/document':>13}{'padding':>9}{'first-fit':>11}{'ours':>6}{'concatenated':>14}"
    )
    worst, peers, fitting_cut = 0.0, [], 0
    for mean in MEANS:
        rng = np.random.default_rng(mean)
        lengths = np.exp(rng.normal(np.log(mean) - SIGMA**2 / 2, SIGMA, TOKENS // mean)).clip(2, 10**6).astype(np.int32)
        started = time.process_time()
        ends, samples, *_ = packing.count_samples(lengths, SEQ_LEN, packing.NO_CUTS, is_last=True)
        cost = (time.process_time() - started) / len(lengths) * 1e9
        inputs = (lengths - 1).sum(dtype=np.int64)
        padding = 1 - inputs / (samples.sum() * SEQ_LEN)
        cut = count_cut(lengths[: int(ends[min(50, len(ends) - 1)])])
        peer = first_fit_padding(np.minimum(lengths[:PEER_DOCUMENTS] - 1, SEQ_LEN))
        boundaries = np.arange(SEQ_LEN, inputs, SEQ_LEN)
        starts = np.cumsum(lengths - 1, dtype=np.int64)
        hit = np.unique(np.searchsorted(starts, boundaries, "right"))
        concatenated = np.mean(lengths[hit[hit < len(lengths)]] - 1 <= SEQ_LEN) * len(hit) / len(lengths)
        print(f"{mean:>6}{len(lengths):>11}{cost:>13.1f}{padding:>9.3%}{peer:>11.2%}{cut:>6}{concatenated:>14.1%}")
        worst, fitting_cut = max(worst, padding), fitting_cut + cut
        peers.append(peer)
    finish("packing", ours=worst, peer=1.0, bar=BAR, holds=fitting_cut == 0)


def count_cut(lengths: np.ndarray) -> int:
    """Return how many documents that fit into a sample are in more than one piece, sample by sample."""
    ends, samples, *_ = packing.count_samples(lengths, SEQ_LEN, packing.NO_CUTS, is_last=True)
    cut = 0
    for begin, end, count in zip([0, *ends], ends, samples):
        own = lengths[begin:end]
        packed = [packing.pack_sample(own, SEQ_LEN, packing.NO_CUTS, sample) for sample in range(count)]
        pieces = np.bincount(np.concatenate([sample["document"] for sample in packed]), minlength=len(own))
        cut += int(((pieces != 1) & (own - 1 <= SEQ_LEN)).sum())
        filled = [int(sample["length"].sum()) for sample in packed]
        if max(filled) > SEQ_LEN or sum(filled) != (own - 1).sum():
            raise SystemExit("a sample is too full, or an input is lost")
    return cut


def first_fit_padding(lengths: np.ndarray) -> float:
    """Return the padding of first-fit over OPEN_SAMPLES open samples, the fullest being closed when none fits."""
    rooms: list[int] = []
    num_samples = 0
    for length in lengths.tolist():
        place = next((index for index, room in enumerate(rooms) if room >= length), None)
        if place is None:
            if len(rooms) == OPEN_SAMPLES:
                rooms.pop(int(np.argmin(rooms)))
            rooms.append(SEQ_LEN)
            num_samples += 1
            place = len(rooms) - 1
        rooms[place] -= length
    return 1 - lengths.sum() / (num_samples * SEQ_LEN)


if __name__ == "__main__":
    main()
