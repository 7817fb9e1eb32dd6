"""Running simulators and provers, and counting what they covered."""
