"""What every room stands on: errors and exit codes, paths, the cache, limits of this machine, programs, Ctrl-C."""
