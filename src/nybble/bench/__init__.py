"""Measuring: every result checked before it is timed, cold L2, CUDA-graph replay, peers in the same run."""
