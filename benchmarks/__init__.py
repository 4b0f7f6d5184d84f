"""Measures the gateway against its peers, all of them in one interleaved run on one machine.

    python -m benchmarks                       every scenario
    python -m benchmarks tiny-json --rounds 5  one of them
    python -m benchmarks --tune-triton         first find Triton's best flags for each scenario (minutes)

Rules: the figure that counts is a ratio of two medians of the same run; rounds rotate over the systems so that a
slow moment of the machine hits all of them; every system's answers are compared with onnxruntime's before it is
measured; a round with a single failed request is an error, not a figure; the peer runs at its best known flags.
"""
