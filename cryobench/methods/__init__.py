"""Denoisers: one file each, found by being here. Start with base.py, then any one of them."""
