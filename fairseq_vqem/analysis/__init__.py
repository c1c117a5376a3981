"""What the latents hold."""
