"""Measures of what was trained: reconstructions, denoising losses, distances between sets of images."""
