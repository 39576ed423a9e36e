# SPDX-License-Identifier: Apache-2.0
"""docs/scaling.md's tables: its formulas evaluated, `python -m benchmarks.scaling`.

A model with assumptions, which stand in that page; nothing is measured.
"""

from __future__ import annotations

D_MODEL, D_INNER, D_STATE, D_CONV, ACTIVATION = 1024, 2048, 16, 4, 2
GATHERED_RANKS = 16
FLOPS, MEMORY = 400e12, 2.5e12  # a second
LINKS = {"NVLink": (400e9, 10e-6), "Ethernet": (12.5e9, 50e-6)}  # bytes a second, seconds
RANKS = (8, 64, 512)
LENGTHS = {"1M": 1 << 20, "16M": 1 << 24, "1G": 1 << 30}


def messages() -> list[tuple[int, int]]:
    """Bytes of a rank's message and of its result, of each exchange of a training step."""
    halo, carry = D_INNER * (D_CONV - 1), 4 * D_INNER * D_STATE
    return [
        (halo * ACTIVATION, halo * ACTIVATION),
        (carry + 4 * D_INNER, carry),
        (4 * halo, 4 * halo),
        (carry, carry),
    ]


def received(ranks: int) -> int:
    """Bytes that a rank receives in a training step of a layer."""
    if ranks <= GATHERED_RANKS:
        return sum((ranks - 1) * message for message, _ in messages()) + 8 * (ranks - 1)
    part = (ranks - 1) / ranks
    return round(sum(part * (message + result) for message, result in messages())) + 8 * (ranks - 1)


def seconds(tokens: float, ranks: int, bandwidth: float, latency: float) -> float:
    """Of a training step of a layer on one rank."""
    dt_rank = D_MODEL // 16
    weights = 3 * D_MODEL * D_INNER + D_INNER * (2 * dt_rank + 2 * D_STATE)
    compute = tokens * (6 * weights / FLOPS + 60 * D_INNER / MEMORY)
    if ranks == 1:
        return compute
    collectives = 1 + len(messages()) * (1 if ranks <= GATHERED_RANKS else 2)
    extra = tokens * 14 * D_INNER / MEMORY
    return compute + extra + collectives * latency + received(ranks) / bandwidth


def main() -> None:
    print("| ranks | received, a layer's training step |")
    print("| --- | --- |")
    for ranks in RANKS:
        print(f"| {ranks} | {received(ranks) / 1024:,.0f} KiB |")
    print()
    links = [f"{length}, {link}" for length in LENGTHS for link in LINKS]
    print("| times faster than one rank | " + " | ".join(links) + " |")
    print("| --- |" + " --- |" * len(links))
    for ranks in RANKS:
        cells = [
            f"{seconds(n, 1, *link) / seconds(n / ranks, ranks, *link):.1f}"
            for n in LENGTHS.values()
            for link in LINKS.values()
        ]
        print(f"| {ranks} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
