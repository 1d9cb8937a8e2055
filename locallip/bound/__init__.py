"""The bound: everything that a certificate rests on. It imports nothing outside of itself but torch and numpy."""
