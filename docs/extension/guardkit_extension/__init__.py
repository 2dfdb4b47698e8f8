"""One part of each kind for guardkit: a world of coloured dots, in which red ones are forbidden."""
