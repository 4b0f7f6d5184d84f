"""The gateway beside a real Triton: the same requests to both, and every difference explained or a failure."""
