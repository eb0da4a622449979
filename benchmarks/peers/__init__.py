"""The engines that `benchmarks/compare.py` measures, one adapter each; an adapter is a script that runs on its own."""
