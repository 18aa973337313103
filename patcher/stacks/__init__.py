"""The stock stacks: where they are installed, how, and from which version they read a route."""
