"""Network architectures used by more than one method."""
