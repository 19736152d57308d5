"""What a student kept of its teacher, and what it saves."""
