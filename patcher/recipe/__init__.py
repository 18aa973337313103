"""The recipe: its schema, its text and lines, and errors that point at a line."""
