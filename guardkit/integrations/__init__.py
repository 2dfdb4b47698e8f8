"""Guards in the places that other libraries have for them: a file each, which imports that library only when it is asked for."""
