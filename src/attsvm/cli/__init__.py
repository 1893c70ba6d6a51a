"""The command line. Only this package prints, reads arguments or exits."""
