"""The stages of benchmarks/gpu_acceptance.py: each is a process of its own, which says what it found as it finds it."""
