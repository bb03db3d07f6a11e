"""Benchmarks, the GPU check-up and the reports that are made from them; not installed."""
