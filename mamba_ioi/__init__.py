"""Trace, patch and reverse-engineer Mamba language models."""
