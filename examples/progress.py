"""Watch tokens being committed, round by round.

python examples/progress.py

`progress` is called with the number of tokens that are final so far, and the number of tokens of the whole request. In
`exact` mode a round commits between one and `draft_length` tokens of each image: all that were accepted, and where a
token was rejected the one that the target drew in its place.
"""

import time

import specdec_rt


def main() -> None:
    pipeline = specdec_rt.load("digits")
    started, before = time.perf_counter(), 0

    def show(committed: int, total: int) -> None:
        nonlocal before
        seconds = time.perf_counter() - started
        print(f"{seconds:6.3f} s  +{committed - before} tokens  {committed:3d} of {total}  {'#' * committed}")
        before = committed

    result = pipeline.generate(labels=[4], seed=3, mode="exact", draft_length=4, progress=show)
    print(f"{result.stats.rounds} rounds, {result.stats.tokens_per_round:.1f} tokens a round")


if __name__ == "__main__":
    main()
