"""Building blocks of the latent transformer."""
