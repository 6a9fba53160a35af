"""Attention over packed tokens. One file per implementation."""
