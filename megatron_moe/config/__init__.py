"""Options: their types, rules and the way from Hydra to them."""
