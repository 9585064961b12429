"""Each engine makes an `Ask`. They know the wire and the silos, never a method."""
