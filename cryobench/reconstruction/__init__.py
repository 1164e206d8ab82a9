"""Volumes from particle images with known poses."""
