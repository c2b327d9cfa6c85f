"""What every room stands on: errors and their exit codes, paths, the cache, limits of this machine, programs, Ctrl-C."""
