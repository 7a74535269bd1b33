"""Pure arithmetic on a configuration: parameters, placement."""
