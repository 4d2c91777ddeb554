"""The commands of the command line, a module each.

In: its arguments. Out: text for people, or JSON for programs, and an exit code.
"""
