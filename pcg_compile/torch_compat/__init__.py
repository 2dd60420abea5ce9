"""What pcg uses of torch's private parts, one file per area. No other package names one.

Each use goes through :mod:`.probe`, with the versions of torch that it was read in.
"""
