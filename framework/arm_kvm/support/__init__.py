"""What every room uses: errors and exit codes, paths, the cache, limits of this machine, programs, Ctrl-C."""
