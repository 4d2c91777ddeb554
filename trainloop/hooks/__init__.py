"""The hooks that come with trainloop, one concern a file."""
