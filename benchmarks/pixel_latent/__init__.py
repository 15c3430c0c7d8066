"""The parts of `benchmarks.pixel_vs_latent`: what diffusion costs in pixels and in latents of every factor."""
