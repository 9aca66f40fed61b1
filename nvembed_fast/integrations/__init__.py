"""Doors into other libraries. A file is named like its library, and no other file imports that library."""
