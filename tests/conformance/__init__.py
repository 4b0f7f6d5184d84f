"""Conformance kit: does a server speak the Open Inference Protocol?

    python -m tests.conformance http://127.0.0.1:8000 --grpc 127.0.0.1:8001 [--model NAME] [--json FILE]

Black-box: it knows nothing but the protocol, finds the models by itself and makes requests that fit their metadata,
so it runs against any server. A check is *required* by the protocol, *recommended* by it, or belongs to an *extension*
of Triton's that the server says it has (`extensions` of `GET /v2`); extensions that a server does not name are not held
against it. Exit code 0: every required check passed; 1: one did not; 2: the server could not be examined.
"""
