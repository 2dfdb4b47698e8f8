"""From a configuration to objects to one call, a file a command. Only this room knows Hydra."""
