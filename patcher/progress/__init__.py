"""What is going on: the time that each stage takes, and how whoever runs it is told."""
