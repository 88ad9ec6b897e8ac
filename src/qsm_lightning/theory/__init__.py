"""What the papers prove, in cases small enough to compute exactly."""
