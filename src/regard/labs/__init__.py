"""Experiments with known or measurable answers: training dynamics and recipes."""
