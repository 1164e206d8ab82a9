"""From a density volume to noisy particle images."""
