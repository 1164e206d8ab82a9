"""Scores: what a denoised image is worth."""
