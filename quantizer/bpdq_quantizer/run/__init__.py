"""A run of `bpdq quantize`: its options, its folder, its workers, and the recipe that it follows."""
