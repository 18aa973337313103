"""An edit before block 0: a parameter that shifts what the residual stream begins as, and the route that writes it."""
