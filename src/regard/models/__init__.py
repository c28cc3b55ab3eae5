"""Complete systems, by domain: each with `fit`, `generate` or `predict`, and `evaluate`."""
