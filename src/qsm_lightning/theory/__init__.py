"""What the paper proves, in cases small enough to compute exactly."""
