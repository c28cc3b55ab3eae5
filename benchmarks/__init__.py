"""What observing attention costs, beside the usual ways; `python -m benchmarks` (or `make bench`) measures it."""
