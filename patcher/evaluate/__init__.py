"""What a vector does and what it breaks: effect, damage, completions."""
